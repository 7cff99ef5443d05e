"""Promises of every way in: the BLAS before mlx, no file of the user's, a sentence for a mistake.

Each case has a process of its own, which starts without conftest.py.
"""

import json
import sys

import pytest

from mlx_vlm_prune.machine import blas
from mlx_vlm_prune.scenes import CHECKPOINT

from .entry_points import EXECUTED, modules, run, start_python, write_user_files

COMMANDS = [
    name
    for name, is_command in modules("mlx_vlm_prune", "torch_ref", "convert", "benchmarks")
    if is_command and name != "mlx_vlm_prune"  # its usage is another: tests/test_skeleton.py
]
LATE = "too late"  # how the reason begins where mlx came first
EXTRA = "pip install 'mlx-vlm-prune[{}]'"

# Of commands that can do something only with a package that may be missing: the arguments that ask
# for it, the package, and how to get it.
NEEDS = {
    "benchmarks.conversion": ([], "torch", EXTRA.format("torch")),
    "benchmarks.figures": ([], "matplotlib", EXTRA.format("plot")),
    "benchmarks.rivals": (["--rival", "transformers"], "torch", "pip install torch transformers"),
    "benchmarks.speed": (["--backend", "torch"], "torch", EXTRA.format("torch")),
    "convert": (["to-torch", str(CHECKPOINT), "a.pth"], "torch", EXTRA.format("torch")),
    "mlx_vlm_prune.app": ([], "gradio", EXTRA.format("app")),
    "mlx_vlm_prune.plot": (["a.json"], "matplotlib", EXTRA.format("plot")),
    "mlx_vlm_prune.serve": ([], "fastapi", EXTRA.format("serve")),
    "mlx_vlm_prune.scan": (["--plot", "a.svg"], "matplotlib", EXTRA.format("plot")),
    "torch_ref.train": (
        ["--stage", "sft", "--data", "nowhere"],
        "torch",
        EXTRA.format("torch"),
    ),
    "torch_ref.train_scenes": ([], "torch", EXTRA.format("torch")),
    "torch_ref.verify": (["a", "b", "--image", "c"], "torch", EXTRA.format("torch")),
}

# What a command wants before its options.
REQUIRED = {
    "convert": ["inspect", "a"],
    "mlx_vlm_prune.generation.recording": ["a", "--image", "b", "--pruner", "norm", "--out", "c"],
    "mlx_vlm_prune.new_method": ["a"],
    "mlx_vlm_prune.plot": ["a.json"],
    "mlx_vlm_prune.scenes.vocabulary": ["a"],
    "torch_ref.verify": ["a", "b", "--image", "c"],
}


@pytest.fixture(scope="module", params=COMMANDS)
def command(request):
    return request.param


@pytest.fixture(scope="module")
def process(command, tmp_path_factory):
    """A command without torch and matplotlib, among the user's files: its --help, a wrong option,
    and what it cannot do without them."""
    folder = write_user_files(tmp_path_factory.mktemp("home") / "user", command)
    before = set(folder.iterdir())
    runs = [["--help"], [*REQUIRED.get(command, []), "--no-such-option"]]
    runs += [NEEDS[command][0]] if command in NEEDS else []
    done = run(folder, command, *runs, missing=("torch", "matplotlib", "fastapi", "gradio"))
    assert set(folder.iterdir()) == before
    return done


def test_help_needs_neither_torch_nor_matplotlib(command, process):
    first, *_ = process.outcomes
    assert (first.code, first.err) == (0, "")
    assert first.out.startswith("usage: python -m ")
    assert command.split(".")[-1] in first.out.splitlines()[0]


def test_an_unknown_option_is_refused_in_one_sentence(process):
    assert "--no-such-option" in process.outcomes[1].sentence


def test_a_package_that_is_missing_is_named_with_how_to_get_it(command, process):
    if command not in NEEDS:
        assert len(process.outcomes) == 2  # nothing here needs one
        return
    _, package, install = NEEDS[command]
    sentence = process.outcomes[2].sentence
    assert package in sentence and install in sentence


def test_a_command_has_the_blas_before_mlx(process):
    assert not process.blas.startswith(LATE)


def test_a_file_of_the_users_is_executed_where_python_itself_takes_it(tmp_path):
    """So that the folder of the other tests means something."""
    folder = write_user_files(tmp_path / "user", "mlx_vlm_prune")
    for arguments in (["-c", "import convert"], ["-m", "convert"], ["-m", "torch_ref.train"]):
        assert EXECUTED in start_python(folder, *arguments).stderr


EVALUATE = ["--per-kind", "1", "--pruner", "uniform", "--keep-tokens", "49"]
JOBS = {  # arguments, and the exit code, of runs in one process
    "mlx_vlm_prune": [
        ([], 2),
        (["pruners"], 0),
        (["convert", "inspect", str(CHECKPOINT)], 0),
        (["advise", "--help"], 0),
        (["evaluate", "--help"], 0),
        (["generate", "--help"], 0),
    ],
    "mlx_vlm_prune.evaluate": [(EVALUATE, 0)],
    "convert": [(["inspect", str(CHECKPOINT)], 0)],
}


@pytest.mark.parametrize("module", JOBS)
def test_a_job_executes_no_file_of_the_users_and_has_the_blas(tmp_path, module):
    """Python itself takes a top-level file before a package of that name: `python -m convert` and
    `python -m torch_ref.train` run where there is no convert.py or torch_ref.py. The converter can
    be had beside a convert.py too, as `python -m mlx_vlm_prune convert`."""
    folder = write_user_files(tmp_path / "user", module)
    arguments, codes = zip(*JOBS[module], strict=True)
    done = run(folder, module, *arguments, MLX_VLM_PRUNE_CACHE=str(tmp_path / "cache"))
    assert [outcome.code for outcome in done.outcomes] == list(codes), done.outcomes
    assert not [outcome for outcome in done.outcomes if EXECUTED in outcome.out + outcome.err]
    assert not done.blas.startswith(LATE)
    assert ("mlx.core" in done.modules) == module.startswith("mlx_vlm_prune")


def test_the_console_script_executes_no_file_of_the_users(tmp_path):
    folder = write_user_files(tmp_path / "user", "mlx_vlm_prune")
    arguments = ["bin/mlx-vlm-prune", "convert", "inspect", str(CHECKPOINT)]
    code = f"import sys; sys.argv = {arguments}; from mlx_vlm_prune.__main__ import main; main()"
    done = start_python(folder, "-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert "minimind2-v" in done.stdout


def test_the_demo_answers_among_the_users_files_with_the_blas(tmp_path):
    folder = write_user_files(tmp_path / "user", "mlx_vlm_prune")
    done = start_python(folder, "-m", "mlx_vlm_prune.generate", "--json", "a.json")
    assert done.returncode == 0, done.stderr
    answer = json.loads((folder / "a.json").read_text(encoding="utf-8"))
    assert answer["visual_tokens_kept"] < answer["visual_tokens"]
    if blas._wheel_has_reference_blas():
        assert answer["versions"]["blas"] is not None


IMPORTS = (
    "from mlx_vlm_prune import generate, load",
    "from mlx_vlm_prune import load, generate",
    "from mlx_vlm_prune import load",
    "from mlx_vlm_prune import pruned",
    "from mlx_vlm_prune import PRUNERS",
    "import mlx_vlm_prune.hosts.attach",
    "import mlx_vlm_prune.models.vlm",
    "import convert.quantise, mlx.core",
    *(f"import {name}" for name, is_command in modules("benchmarks") if not is_command),
)
SLOW = "import benchmarks.rival_transformers"  # of transformers; `rivals` imports it last


@pytest.mark.parametrize("line", [line for line in IMPORTS if line != SLOW])
def test_whatever_is_imported_first_has_the_blas_before_mlx(tmp_path, line):
    """A library that is none is named: it is refused, unless it is too late, and costs no time."""
    code = f"{line}; from mlx_vlm_prune.machine import blas; print(blas.reason())"
    done = start_python(tmp_path, "-c", code, **{blas.SWITCH: "libm.so.6"})
    assert done.returncode == 0, done.stderr
    expected = "refused" if sys.platform == "linux" else "not needed on this system"
    assert done.stdout.strip() == expected
