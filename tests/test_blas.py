"""A real BLAS for MLX on Linux CPU. What is loaded stays loaded: each case has its own process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from mlx_vlm_prune.machine import blas

ROOT = Path(__file__).resolve().parents[1]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="acts on Linux only")
with_reference_blas = pytest.mark.skipif(
    sys.platform != "linux" or not blas._wheel_has_reference_blas(),
    reason="this mlx brings no reference BLAS",
)

BEFORE = """
    import ctypes, json, os, sys
    import numpy as np
    from mlx_vlm_prune.machine import blas
    from mlx_vlm_prune.checkpoints.errors import UserError

    def matrices():
        return np.random.default_rng(0).standard_normal((2, 300, 300), dtype=np.float32)

    def error(product):
        a, b = matrices().astype(np.float64)
        return float(abs(np.array(product) - a @ b).max())

    def mlx_error():
        import mlx.core as mx
        a, b = matrices()
        return error(mx.array(a) @ mx.array(b))

    def sentence():
        try:
            return f"loaded {blas.load()}"
        except UserError as e:
            return str(e)
"""


def fresh(code: str, library: str | None = None, first: str = "", **environ: str) -> Any:
    """The value of the last line, an expression, in a new Python with this switch; `first` is run
    before anything of ours is imported."""
    *lines, last = dedent(code).strip().splitlines()
    program = "\n".join([first, dedent(BEFORE), *lines, f"print(json.dumps(({last})))"])
    ours = (blas.SWITCH, "OMP_WAIT_POLICY")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    switch = {} if library is None else {blas.SWITCH: library}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=inherited | switch | environ,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@with_reference_blas
def test_torchs_blas_is_taken_without_importing_torch_and_comes_before_the_wheels():
    name, loaded, mine, bound, imported = fresh("""
        name = blas.load()
        import mlx.core
        mine = ctypes.CDLL(next(blas._candidates())).sgemm_
        bound = ctypes.CDLL(None).sgemm_  # what a library loaded after it gets
        address = lambda f: ctypes.cast(f, ctypes.c_void_p).value
        name, blas.loaded(), address(mine), address(bound), "torch" in sys.modules
    """)
    assert name == loaded == "libtorch_cpu.so"
    assert mine == bound
    assert not imported


@pytest.mark.parametrize("switch", ["auto", "off"])
def test_products_agree_with_numpy_whatever_the_switch(switch):
    assert fresh("blas.load(), mlx_error()", switch)[1] < 1e-4


def test_torch_still_works_when_it_is_imported_later_in_the_same_process():
    ours, theirs, rank = fresh("""
        blas.load()
        ours = mlx_error()
        import torch
        a, b = map(torch.from_numpy, matrices())
        ours, error(a @ b), int(torch.linalg.matrix_rank(a))
    """)
    assert max(ours, theirs) < 1e-4
    assert rank == 300


@with_reference_blas
def test_a_blas_is_still_in_time_after_torch_is_imported():
    assert fresh("blas.load()", first="import torch")


def test_off_loads_nothing():
    assert fresh("blas.load(), blas.loaded()", "off") == [None, None]


@pytest.mark.parametrize(
    "library",
    [pytest.param("auto", marks=with_reference_blas), pytest.param("libm.so.6", marks=on_linux)],
)
@pytest.mark.parametrize("call", ["load()", "attach(None, 'norm')"])
def test_after_mlx_is_imported_nothing_is_loaded_and_it_is_told_once_in_one_sentence(library, call):
    lines, loaded, reason = fresh(
        """
        import logging
        lines = []
        class Lines(logging.Handler):
            def emit(self, record):
                lines.append((record.name, record.levelname, record.getMessage()))
        logging.getLogger("mlx_vlm_prune").addHandler(Lines())
        from contextlib import suppress
        from mlx_vlm_prune import attach, load
        for _ in range(2):
            with suppress(ValueError):
                CALL
        lines, blas.loaded(), blas.reason()
        """.replace("CALL", call),
        library,
        first="import mlx.core",
    )
    assert loaded is None
    assert "mlx was imported first" in reason
    assert lines == [["mlx_vlm_prune", "WARNING", blas.LATE]]
    assert "import mlx_vlm_prune first" in blas.LATE and "\n" not in blas.LATE


def test_loading_again_changes_nothing_even_after_mlx():
    first, again, reason, reason_again = fresh("""
        first, reason = blas.load(), blas.reason()
        import mlx.core
        first, blas.load(), reason, blas.reason()
    """)
    assert first == again
    assert reason == reason_again


def test_nothing_happens_on_other_systems():
    code, darwin = (
        'blas.load(), "OMP_WAIT_POLICY" in os.environ',
        "import sys; sys.platform = 'darwin'",
    )
    assert fresh(code, first=darwin) == [None, False]
    assert fresh(code, "/no/such/library", first=darwin) == [None, False]


@on_linux
@pytest.mark.parametrize(
    ("path", "complaint"),
    [("/no/such/library.so", "does not load"), ("libm.so.6", "has no sgemm_")],
)
def test_a_path_without_a_blas_is_refused_in_one_sentence_by_load_and_not_by_import(
    path, complaint
):
    first, second = fresh("sentence(), sentence()", path)
    assert first == second
    assert first.startswith(f"{blas.SWITCH} is {path!r}, which {complaint}")
    assert "auto, off, or the path" in first
    assert "\n" not in first


@with_reference_blas
def test_a_path_is_loaded_and_told_by_its_file_name_alone():
    path = fresh("next(blas._candidates())")
    assert fresh("blas.load()", path) == Path(path).name


@with_reference_blas
def test_waiting_threads_sleep_unless_the_user_says_otherwise():
    code = """
        blas.load()
        os.environ["OMP_WAIT_POLICY"]
    """
    assert fresh(code) == "passive"
    assert fresh(code, OMP_WAIT_POLICY="active") == "active"


@pytest.mark.parametrize("first", ["", "import mlx.core"])
def test_float32_is_not_multiplied_in_tf32_whatever_the_environment_says(first):
    lines, value = fresh(
        f"""
        import logging, mlx.core
        lines = []
        logging.getLogger("mlx_vlm_prune").warning = lines.append
        mlx.core.default_device = lambda: "Device(gpu, 0)"
        for _ in range(2):
            blas.load()
        [line for line in lines if "TF32" in line], os.environ[{blas.TF32!r}]
        """,
        first=first,
        **{blas.TF32: "1"},
    )
    assert value == "0"
    assert lines == ([blas.LATE_TF32] if first else [])
