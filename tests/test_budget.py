"""Budgets in milliseconds and GB. No measured time is asserted.

The choice is checked by hand on a made-up calibration (tests/calibrations.py).
"""

import gc
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.inputs.budget import tokens_for
from mlx_vlm_prune.machine.hardware import environment
from mlx_vlm_prune.planning import budgets, calibration
from mlx_vlm_prune.planning.budgets import (
    Budget,
    BudgetChoice,
    Workload,
    check_free_budget,
    choose,
    forecast,
    keep_within,
)
from mlx_vlm_prune.planning.calibration import calibrate, load_calibration
from mlx_vlm_prune.pruners import plan

from . import calibrations
from .calibrations import (
    LONG_TEXT,
    MB,
    QUESTION,
    RUNS,
    SHORT_TEXT,
    N,
    inputs_of,
    run,
    save_calibration,
    slowed,
)  # fmt: skip

LEAST_SLACK = calibration.LEAST_SLACK


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return calibrations.write_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "mlx")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    return calibrations.isolate(monkeypatch, tmp_path / "cache")


def workload(**more) -> Workload:
    default = {"text": SHORT_TEXT, "images": 1, "image_ms": 5.0, "held_bytes": 100 * MB}
    return Workload(**{**default, "max_tokens": 1, **more})


def chosen(budget: Budget, calibration=None, feasible=range(1, N), **more) -> BudgetChoice:
    return choose(calibration or calibrations.of(), budget, workload(**more), feasible)


def test_k_is_the_largest_within_the_time():
    """5 for the image, 100, 1 and 8 for the text leave 6 of 120 ms: one token a millisecond."""
    choice = chosen(Budget(ms=120))
    assert (choice.K, choice.N, choice.reason) == (6, N, "")
    assert choice.expected.ms == pytest.approx(120)
    assert choice.options == {"pruner": "norm", "keep_tokens": 6}
    assert str(choice).startswith("Budget: 120 ms -> 6 of 16 visual tokens, predicted median")


def test_a_longer_prompt_and_a_larger_image_leave_room_for_fewer_tokens():
    assert chosen(Budget(ms=120), text=11).K == 3
    assert chosen(Budget(ms=120), image_ms=9.0).K == 2


def test_nothing_is_pruned_where_all_tokens_meet_the_budget():
    """All 16 take 5 + 100 + 0 + 24: no pruner runs then."""
    choice = chosen(Budget(ms=129))
    assert (choice.K, choice.reason) == (N, "")
    assert choice.options == {"pruner": "none", "keep_tokens": N}


def test_k_is_that_of_each_image():
    """Two take 5 + 180 + 2 + 8 + 2 K: 5 of 205 ms."""
    calibration = calibrations.of(*RUNS, *(run(K, images=2, vision=180.0) for K in (4, N)))
    assert chosen(Budget(ms=205), calibration, images=2).K == 5


def test_a_method_inside_the_tower_has_a_tower_time_for_every_k():
    """20 ms and 5 more a token: with 120 for all, 5 + 20 + 5 K + 1 + 8 + K allows 11 of 100."""
    inside = [run(K, vision=20.0 + 5 * K) for K in (1, 8, 15)]
    calibration = calibrations.of(
        *inside, run(N, vision=120.0), run(8, LONG_TEXT, vision=60.0), in_tower=True
    )
    assert chosen(Budget(ms=100), calibration).K == 11


def test_nineteen_of_twenty_runs_meet_the_budget():
    """Of 45 runs with three runs before them two may be slow; the choice allows for a third."""
    assert chosen(Budget(ms=120), slowed(1.1, {10, 20})).K == 6
    calibration = slowed(1.1, {10, 20, 30})
    assert chosen(Budget(ms=1.1 * 120), calibration).K == 6
    assert chosen(Budget(ms=1.1 * 120 - 0.01), calibration).K == 5


def test_there_is_a_least_slack_however_steady_the_calibration_was(monkeypatch):
    monkeypatch.setattr(calibration, "LEAST_SLACK", LEAST_SLACK)
    assert calibrations.of().slack == LEAST_SLACK > 1.0
    assert chosen(Budget(ms=LEAST_SLACK * 120)).K == 6
    assert chosen(Budget(ms=LEAST_SLACK * 120 - 0.01)).K == 5


def test_a_machine_that_is_slower_now_gets_fewer_tokens():
    """5 + 1.1 x (100 + 1 + 8 + K) allows 3 of 128.3 ms."""
    assert chosen(Budget(ms=128.3), level=1.1).K == 3


def test_memory_is_the_held_bytes_and_the_most_of_any_part():
    """100 MB of weights and 20 of the tower; the text and 13 tokens take 21 of the prefill,
    and 1 % is slack."""
    assert chosen(Budget(gb=0.1213)).K == 13
    (full,) = forecast(calibrations.of(), workload(), N)
    assert full.gb == pytest.approx((100 + 1.01 * 24) / 1000)


def test_a_long_answer_needs_room_in_the_cache():
    """3000 rows are allocated as 3072."""
    rows = workload(max_tokens=3000 - SHORT_TEXT - 4)
    (expected,) = forecast(calibrations.of(row_bytes=10_000), rows, 4)
    assert expected.gb == pytest.approx(0.1 + 1.01 * 0.03072)


def test_the_tighter_of_two_limits_decides():
    assert chosen(Budget(120, 0.1213)).K == 6
    assert chosen(Budget(128, 0.1213)).K == 13
    line = str(chosen(Budget(120, 0.1213)))
    assert line.startswith("Budget: 120 ms and 0.1213 GB -> 6 of 16")


def test_the_reason_is_the_tower_where_it_alone_takes_longer():
    choice = chosen(Budget(ms=90))
    assert choice.K == N and choice.options["pruner"] == "none"
    assert "cannot meet 90 ms, so nothing is pruned" in choice.reason
    assert "the image and the vision tower alone take 105 ms" in choice.reason
    assert "downsample" in choice.reason


def test_the_reason_is_the_least_k_where_it_takes_longer():
    choice = chosen(Budget(ms=110))
    assert choice.K == N
    assert "with 1 visual token it takes up to 115 ms in 19 of 20 runs" in choice.reason
    inside = chosen(Budget(ms=90), calibrations.of(in_tower=True))
    assert "tower alone" not in inside.reason and "downsample" not in inside.reason


def test_the_reason_is_the_weights_where_they_alone_take_more():
    assert "weights alone take 0.100 GB" in chosen(Budget(gb=0.09)).reason
    least = chosen(Budget(gb=0.11)).reason
    assert "with 1 visual token it takes 0.120 GB" in least


def test_only_feasible_budgets_are_chosen():
    assert chosen(Budget(ms=120), feasible=range(3, N, 2)).K == 5
    assert chosen(Budget(ms=115), feasible=range(3, N, 2)).reason


@given(st.floats(50, 300), st.floats(0, 40), st.integers(1, 300), st.integers(1, 3))
def test_the_largest_k_that_fits_is_chosen_and_more_time_never_keeps_fewer(ms, more, text, images):
    request = {"text": text, "images": images}
    first, second = (chosen(Budget(ms=limit), **request) for limit in (ms, ms + more))
    if not first.reason:
        assert first.expected.ms_most <= ms
        assert not second.reason and second.K >= first.K
    larger = range(1 if first.reason else first.K + 1, N + 1)
    forecasts = forecast(calibrations.of(), workload(**request), *larger)
    assert all(expected.ms_most > ms for expected in forecasts)


def test_an_outcome_has_the_error_of_the_prediction():
    choice = chosen(Budget(120, 0.2))
    answer = Answer({"total": 114.0}, 0.12)
    assert choice.outcome(answer) == (
        "Budget met: 114 ms of 120 ms (predicted median 120 ms, 5.0 % off), "
        "0.120 GB of 0.2 GB (predicted peak 0.120 GB, 0.2 % off)"
    )
    late = replace(choice, budget=Budget(ms=110))
    assert late.outcome(answer).startswith("Budget missed: 114 ms of 110 ms")
    figures = choice.as_json(answer)
    assert figures["off"]["ms"] == pytest.approx(-0.05) and figures["met"] is True
    assert Budget(ms=1).allows(1, 1) and not Budget(gb=0.9).allows(1, 1)


class Answer:
    """The fields of a result that an outcome reads."""

    def __init__(self, ttft_ms: dict[str, float], peak_memory: float):
        self.ttft_ms, self.peak_memory = ttft_ms, peak_memory


# With a model.


def test_the_calibration_of_another_machine_is_replaced(loaded, home, cache):
    """Saved by a machine a thousand times as fast: measuring the level shows it."""
    model, processor = loaded
    file = save_calibration(loaded, home, cache)
    content = json.loads(file.read_text())
    for saved in content["runs"]:
        saved["ms"] = {part: ms / 1000 for part, ms in saved["ms"].items()}
    file.write_text(json.dumps(content))
    old = load_calibration(file, environment(model.dtype))
    picture = home / "a.png"
    choice = keep_within(model, processor, QUESTION, picture, pruner="norm", ms=1e9)
    new = load_calibration(file, environment(model.dtype))
    assert old and new and old.runs != new.runs
    assert choice.workload.level < 1000 / budgets.SAME_MACHINE


def test_the_calibration_of_a_model_without_a_folder_is_not_saved(loaded, home, cache):
    model, processor = loaded
    processor = replace(processor, folder=None)
    picture = home / "a.png"
    choice = keep_within(model, processor, QUESTION, picture, pruner="norm", ms=1e9)
    assert choice.K == model.N and not cache.exists()


def test_learned_pools_and_budgets_of_each_image_are_refused():
    with pytest.raises(UserError, match="attention_pool was trained for 5 visual tokens"):
        check_free_budget(LearnedPool(), 16)
    with pytest.raises(UserError, match="leave out dynamic"):
        check_free_budget(plan("norm+restore", {}).of(Dynamic()), 16)


class LearnedPool:
    name = spec = "attention_pool"
    trained_tokens, steps = 5, ()


class Dynamic:
    name = spec = "mlp:dynamic"
    has_dynamic_budget, trained_tokens, enhancer = True, None, None


# The command line.


def command(home, *more: str) -> list[str]:
    picture = ["--image", str(home / "a.png")]
    return ["--model", str(home / "mlx"), "-p", QUESTION, *picture, "--max-tokens", "3", *more]


def test_the_prediction_comes_before_the_answer_and_the_outcome_after(
    loaded, home, capsys, monkeypatch, tmp_path
):
    """All parts take seconds instead of milliseconds: opening the image does not matter then."""
    slow = [replace(r, ms={part: 1000 * ms for part, ms in r.ms.items()}) for r in RUNS]
    monkeypatch.setattr(calibration, "measure", lambda *_: calibrations.of(*slow))
    monkeypatch.setattr(budgets, "measure_level", lambda *_: 1.0)
    ms = 101_000 + 1000 * (inputs_of(loaded, home).text_tokens + 6) + 900
    file = tmp_path / "a.json"
    main(command(home, "--pruner", "norm", "--budget-ms", str(ms), "--json", str(file)))
    out = capsys.readouterr().out.splitlines()
    figures = json.loads(file.read_text())
    assert figures["visual_tokens_kept"] == figures["budget"]["tokens"] == 6
    assert out[0].startswith(f"Budget: {ms} ms -> 6 of 16 visual tokens, predicted ")
    starts = ("Prompt: ", "Generation: ", "Peak memory: ", "Visual tokens: ", "Time to first token")
    lines = out[-6:-1]
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert out[-1].startswith("Budget met: ") and out[-1].endswith(" % off)")
    keys = {"wish", "level", "pruner", "tokens", "of", "predicted", "why_not", "took", "off", "met"}
    assert figures["budget"].keys() == keys
    assert figures["budget"]["took"]["ms"] == figures["ttft_ms"]["total"]


def test_a_budget_that_cannot_be_met_is_answered_unpruned(home, capsys):
    main(command(home, "--pruner", "norm", "--budget-ms", "0.001"))
    out, err = capsys.readouterr()
    assert "note: pruning with norm cannot meet 0.001 ms, so nothing is pruned" in err
    assert "Visual tokens: 16 -> 16 (0.0% pruned)" in out
    assert "Budget missed: " in out


def test_a_generous_budget_keeps_all_tokens(home, capsys):
    main(command(home, "--pruner", "norm", "--budget-ms", "1e9", "--budget-gb", "1e3", "--compare"))
    out, err = capsys.readouterr()
    assert "Budget: 1e+09 ms and 1000 GB -> 16 of 16 visual tokens" in out
    assert "Budget met: " in out and "note:" not in err


BAD = {
    "with a ratio": (["--pruner", "norm", "--budget-ms", "9", "--keep-ratio", "0.5"], "leave out"),
    "with tokens": (["--pruner", "norm", "--budget-gb", "9", "--keep-tokens", "5"], "leave out"),
    "with none": (["--pruner", "none", "--budget-ms", "9"], "other than none"),
    "no time": (["--pruner", "norm", "--budget-ms", "0"], "--budget-ms is 0.0"),
    "not a number": (["--pruner", "norm", "--budget-ms", "nan"], "above 0"),
    "less than no memory": (["--pruner", "norm", "--budget-gb", "-1"], "--budget-gb is -1.0"),
    "endless": (["--pruner", "norm", "--budget-gb", "inf"], "above 0"),
    "too shallow": (["--pruner", "fastv:layer=9", "--budget-ms", "9"], "layers 0 to 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_an_invalid_budget_is_refused_in_one_sentence(home, capsys, case):
    flags, part = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(command(home, *flags))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    (line,) = [x for x in err.splitlines() if "error:" in x]
    assert part in line


def test_a_budget_without_an_image_is_refused(home, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(home / "mlx"), "-p", "hi", "--pruner", "norm", "--budget-ms", "9"])
    assert "needs an --image" in capsys.readouterr().err


def test_peak_memory_is_predicted_as_it_is_reported(loaded, home):
    """Within 5 % at a K that was not measured: bytes do not depend on how busy a machine is."""
    model, processor = loaded
    gc.collect()  # what other tests leave would be held at first and not later
    picture, options = home / "a.png", {"pruner": "norm", "max_tokens": 4}
    within = keep_within(model, processor, QUESTION, picture, gb=1, **options)
    calibration = calibrate(model, processor.folder, plan("norm"), inputs_of(loaded, home))
    for K in (3, 10):
        answer = generate(model, processor, QUESTION, picture, keep_tokens=K, **options)
        (expected,) = forecast(calibration, within.workload, K)
        assert expected.gb == pytest.approx(answer.peak_memory, rel=0.05)


# Shares of tokens.


@given(st.integers(1, 5000), st.integers(1, 100))
def test_a_share_of_the_tokens_is_rounded_down_as_on_paper(total, percent):
    """In floating point 29 % of 100 are less than 29."""
    assert tokens_for(total, percent / 100) == max(1, total * percent // 100)
