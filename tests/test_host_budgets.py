"""Budgets of mlx-vlm's models on the command line and in Python; what is predicted, is kept."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.hosts.host import ADAPTERS
from mlx_vlm_prune.planning import host_budgets
from mlx_vlm_prune.planning.budgets import Budget
from mlx_vlm_prune.planning.calibration import LONG_TEXT
from mlx_vlm_prune.planning.host_budgets import keep_within
from mlx_vlm_prune.planning.host_calibration import HostCalibration, SizedRun

from . import calibrations
from .host_folders import desk

FAMILIES = ["llava", "qwen2_5_vl", "smolvlm"]
QUESTION = "w7 w9"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return desk(tmp_path_factory.mktemp("hosts"), FAMILIES)


@pytest.fixture(scope="module")
def loaded(place):
    models = {name: load(place / name) for name in FAMILIES}
    return models.__getitem__


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    return calibrations.isolate(monkeypatch, tmp_path / "cache")


def slow_machine(spec: str = "norm") -> HostCalibration:
    """A row of the language model takes a second, all else nothing; any picture was run."""
    runs, most = [], 64
    for N in (2, most):
        settings = [(K, 1) for K in (1, N // 2, N - 1, N)]
        settings += [(1, LONG_TEXT), (N, LONG_TEXT)] if most == N else []
        for images in (1, 2, 3):
            runs += [timed(K, text, images, N) for K, text in settings]
    return HostCalibration(spec, ((9, 9, 2), (99, 99, most)), tuple(runs), {})


def timed(K: int, text: int, images: int, N: int) -> SizedRun:
    rows = text + images * K
    ms = {"vision": 0.0, "pruner": 0.0, "prefill": 1000.0 * rows}
    return SizedRun(K, text, images, ms, dict.fromkeys(ms, 0), N, rows, 1000 * rows, 0)


@pytest.fixture
def on_slow_machine(monkeypatch):
    monkeypatch.setattr(
        host_budgets, "measure", lambda prompt, older: slow_machine(prompt.pipeline.spec)
    )
    monkeypatch.setattr(host_budgets, "measure_level", lambda *_: 1.0)


@pytest.mark.parametrize("spec", ["tome", "divprune+restore"])
@pytest.mark.parametrize("names", [("a.png",), ("b.png", "a.png")])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_tokens_that_are_predicted_are_those_that_the_answer_read(
    on_slow_machine, place, loaded, kind, names, spec
):
    """Seconds between the least and all; a row takes one, so that none is left unused."""
    model, processor = loaded(kind)
    pictures = [place / name for name in names]
    request = Request(QUESTION, pictures, spec, max_tokens=2)
    full = keep_within(model, processor, request, Budget(gb=1e6))
    assert full.options == {"pruner": "none", "keep_tokens": full.N}
    images, text = full.workload.images, full.workload.text
    chosen = set()
    for K in (full.N // 2, full.N - 1):
        rows = int(full.calibration.rows(K, text, images))
        ms = 1000.0 * rows + 900  # for the images
        choice = keep_within(model, processor, request, Budget(ms=ms))
        assert int(choice.calibration.rows(choice.K, text, images)) == rows
        answer = generate(model, processor, QUESTION, pictures, max_tokens=2, **choice.options)
        assert answer.prompt_tokens == rows
        assert answer.visual_tokens_kept == rows - text < answer.visual_tokens
        chosen.add(choice.K)
    assert len(chosen) == 2
    answer = generate(model, processor, QUESTION, pictures, max_tokens=2, **full.options)
    assert answer.prompt_tokens == int(full.calibration.rows(full.N, text, images))


def command(place, kind: str, *more: str) -> list[str]:
    picture = ["--image", str(place / "a.png")]
    return ["--model", str(place / kind), "-p", QUESTION, *picture, "--max-tokens", "3", *more]


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_the_prediction_comes_before_the_answer_and_the_outcome_after(
    on_slow_machine, place, loaded, kind, capsys, tmp_path
):
    model, processor = loaded(kind)
    full = keep_within(
        model, processor, Request(QUESTION, [place / "a.png"], "norm"), Budget(gb=1e6)
    )
    ms, file = 1000 * (full.workload.text + 3) + 900, tmp_path / "a.json"
    main(command(place, kind, "--pruner", "norm", "--budget-ms", str(ms), "--json", str(file)))
    out = capsys.readouterr().out.splitlines()
    figures = json.loads(file.read_text())
    assert figures["visual_tokens_kept"] == figures["budget"]["tokens"] == 3
    assert out[0].startswith(f"Budget: {ms} ms -> 3 of {full.N} visual tokens, predicted ")
    assert out[-1].startswith("Budget met: ") and out[-1].endswith(" % off)")
    assert figures["budget"]["took"]["ms"] == figures["ttft_ms"]["total"]


def test_a_budget_that_cannot_be_met_is_answered_unpruned(place, capsys):
    main(command(place, "qwen2_5_vl", "--pruner", "norm", "--budget-ms", "0.001"))
    out, err = capsys.readouterr()
    assert "note: pruning with norm cannot meet 0.001 ms, so nothing is pruned" in err
    assert "a smaller image (--resize-shape) may" in err and "downsample" not in err
    assert "(0.0% pruned)" in out and "Budget missed: " in out


def test_a_generous_budget_keeps_all_tokens(place, capsys):
    main(command(place, "llava", "--pruner", "tome", "--budget-ms", "1e9", "--budget-gb", "1e3"))
    out, err = capsys.readouterr()
    assert "Budget: 1e+09 ms and 1000 GB -> 16 of 16 visual tokens" in out
    assert "Budget met: " in out and "cannot meet" not in err


BAD = {
    "with none": (["--pruner", "none", "--budget-ms", "9"], "other than none"),
    "inside the tower": (["--pruner", "kq_norm:layer=9", "--budget-ms", "9"], "layers 0 to "),
    "no such layer": (["--pruner", "fastv:layer=9", "--budget-ms", "9"], "layers 0 to 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_budget_is_refused_in_one_sentence(place, capsys, case):
    flags, part = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(command(place, "llava", *flags))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    (line,) = [x for x in err.splitlines() if "error:" in x]
    assert part in line


def test_options_of_the_picture_are_those_of_the_answer(on_slow_machine, place, loaded):
    """A smaller picture becomes fewer tokens, and is calibrated as such."""
    model, processor = loaded("qwen2_5_vl")
    options = {"host_options": {"resize_shape": [56, 56]}}
    request = Request(QUESTION, [place / "a.png"], "norm", **options)
    small, large = (
        keep_within(model, processor, each, Budget(gb=1e6)).N
        for each in (request, Request(QUESTION, [place / "a.png"], "norm"))
    )
    answer = generate(model, processor, QUESTION, place / "a.png", max_tokens=1, **options)
    assert answer.visual_tokens == small < large


def test_other_ways_of_reading_have_calibrations_of_their_own(
    on_slow_machine, place, loaded, cache
):
    """Other caches, and the adapters that a model was loaded with."""
    model, processor = loaded("llava")

    def files(**options) -> int:
        request = Request(QUESTION, [place / "a.png"], "norm", host_options=options)
        keep_within(model, processor, request, Budget(ms=1e6))
        return len(list((cache / "calibrations").iterdir()))

    assert [files(), files(max_kv_size=99), files(prefill_step_size=9), files()] == [1, 2, 3, 3]
    setattr(model, ADAPTERS, "0123456789abcdef")
    try:
        assert files() == 4
    finally:
        delattr(model, ADAPTERS)
    assert files() == 4


def test_a_budget_of_memory_counts_no_smaller_caches(place, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(place, "llava", "--pruner", "norm", "--budget-gb", "9", "--kv-bits", "4"))
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert "--budget-gb is 9; a budget of memory counts whole caches" in err
    assert "so leave out --kv-bits" in err


def test_a_method_without_a_number_to_choose_is_refused(place, loaded):
    model, processor = loaded("qwen2_5_vl")
    with pytest.raises(UserError, match="a budget needs a pruner other than none"):
        keep_within(model, processor, Request("w7", [place / "a.png"]), Budget(ms=9))


IN_FRESH_PROCESS = """
import sys
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.generation.request import Request
from mlx_vlm_prune.planning.budgets import Budget, forecast
from mlx_vlm_prune.planning.host_budgets import keep_within

place = sys.argv[1]
pictures, options = [place + "/a.png", place + "/b.png"], {"pruner": "norm", "max_tokens": 4}
for kind in ("llava", "qwen2_5_vl"):
    model, processor = load(place + "/" + kind)
    choice = keep_within(model, processor, Request("w7 w9", pictures, **options), Budget(gb=1))
    for K in (3, choice.N - 2, choice.N):
        (expected,) = forecast(choice.calibration, choice.workload, K)
        pruned = {} if K == choice.N else {"keep_tokens": K, **options}
        answer = generate(model, processor, "w7 w9", pictures, **{"max_tokens": 4, **pruned})
        print(expected.gb, answer.peak_memory)
"""


def test_peak_memory_is_predicted_as_it_is_reported_in_a_fresh_process(place, tmp_path):
    """Within 5 %, at K that were not measured, for two images of different sizes."""
    variables = {"MLX_VLM_PRUNE_CACHE": str(tmp_path), "MLX_VLM_PRUNE_CALIBRATION_SECONDS": "0.1"}
    done = subprocess.run(
        [sys.executable, "-c", IN_FRESH_PROCESS, str(place)], env=os.environ | variables,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pairs = [tuple(map(float, line.split())) for line in done.stdout.splitlines()]
    assert len(pairs) == 6
    for expected, measured in pairs:
        assert expected == pytest.approx(measured, rel=0.05)
