"""Promises of budgets in milliseconds and GB; no time is ever asserted.

What is chosen is checked by hand on a made-up calibration: N = 16, the tower takes 100 ms, a
pruner 1 ms, and the language model 1 ms a row. Every run takes as long as the others, unless a
test says otherwise, and what drifts beyond the runs is left out but where a test is about it.
"""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_vlm_prune import budgets, calibrate, generate, load, predict
from mlx_vlm_prune.budgets import calibrated, check, keep_within, read
from mlx_vlm_prune.calibrate import able, about, design, measure
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation.stream import prepare
from mlx_vlm_prune.predict import PARTS, Calibration, Place, Run, rising
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.wish import Forecast, Request, Wish, choose, forecast

from . import tiny

QUESTION = "Is there a red star?"
N, SHORT, LONG = 16, 8, 128
ABLE = range(1, N)
MB = 1_000_000
STEADY = predict.STEADY


@pytest.fixture(autouse=True)
def _as_steady_as_its_runs(monkeypatch):
    monkeypatch.setattr(predict, "STEADY", 1.0)


def run(K: int, text: int = SHORT, images: int = 1, by: float = 1.0, **more: float) -> Run:
    """A run that took `by` times as long as usual; `more` replaces a part's usual ms."""
    rows = text + images * K
    usual = {"vision": 100.0 * images, "pruner": float(K < N) * images, "prefill": float(rows)}
    ms = {part: by * value for part, value in {**usual, **more}.items()}
    nbytes = {"vision": 20 * MB * images, "pruner": 0, "prefill": rows * MB}
    return Run(Place(K, text, images), ms, nbytes)


USUAL = (*(run(K) for K in (1, 8, 15, N)), run(4, LONG), run(N, LONG))


def made(*runs: Run, in_tower: bool = False, row_bytes: int = 1000) -> Calibration:
    return Calibration("norm", N, in_tower, row_bytes, runs or USUAL, {})


def request(**more) -> Request:
    usual = {"text": SHORT, "images": 1, "image_ms": 5.0, "held": 100 * MB, "answer": 1}
    return Request(**{**usual, **more})


def test_k_is_the_largest_that_the_time_allows():
    """5 for the image, 100, 1 and 8 for the words leave 6 of 120 ms: one token a millisecond."""
    choice = choose(made(), Wish(ms=120), request(), ABLE)
    assert (choice.tokens, choice.of, choice.why) == (6, N, "")
    assert choice.expected.ms == pytest.approx(120)
    assert choice.options == {"pruner": "norm", "keep_tokens": 6}
    assert str(choice).startswith("Budget: 120 ms -> 6 of 16 visual tokens, predicted 120 ms")


def test_a_longer_prompt_and_a_larger_image_leave_room_for_fewer_tokens():
    assert choose(made(), Wish(ms=120), request(text=11), ABLE).tokens == 3
    assert choose(made(), Wish(ms=120), request(image_ms=9.0), ABLE).tokens == 2


def test_nothing_is_pruned_where_all_tokens_meet_the_wish():
    """All 16 take 5 + 100 + 0 + 24: no pruner runs then."""
    choice = choose(made(), Wish(ms=129), request(), ABLE)
    assert (choice.tokens, choice.why) == (N, "")
    assert choice.options == {"pruner": "none", "keep_tokens": N}


def test_every_number_of_images_has_its_own_prediction():
    """Two images at once take 180 in the tower, 10 % less than twice one: three take 260."""
    known = made(*USUAL, *(run(K, images=2, vision=180.0) for K in (4, N)))
    assert known.ms(4, SHORT, 2) == pytest.approx({"vision": 180, "pruner": 2, "prefill": 16})
    assert known.ms(4, SHORT, 3) == pytest.approx({"vision": 260, "pruner": 3, "prefill": 20})
    assert choose(known, Wish(ms=205), request(images=2), ABLE).tokens == 5


def test_a_pruner_that_reads_words_takes_longer_with_more_of_them():
    known = made(*(run(K) for K in (1, 4, 15, N)), run(4, LONG, pruner=4.0), run(N, LONG))
    middle = (SHORT + LONG) // 2
    assert known.ms(4, middle, 1) == pytest.approx({"vision": 100, "pruner": 2.5, "prefill": 72})


def test_a_method_inside_the_tower_has_a_tower_time_for_every_k():
    """20 ms and 5 more a token: with 120 for all, 5 + 20 + 5 K + 1 + 8 + K allows 11 of 100."""
    inside = [run(K, vision=20.0 + 5 * K) for K in (1, 8, 15)]
    known = made(*inside, run(N, vision=120.0), run(8, LONG, vision=60.0), in_tower=True)
    assert known.ms(5, SHORT, 1)["vision"] == pytest.approx(45)
    assert choose(known, Wish(ms=100), request(), ABLE).tokens == 11


def slowed(by: float, which: set[int]) -> Calibration:
    """Eight rounds of the usual runs, of which some, by number, took longer."""
    rounds = [replace(r) for _ in range(8) for r in USUAL]
    return made(*(run(*r.place, by=by if n in which else 1.0) for n, r in enumerate(rounds)))


def test_nineteen_of_twenty_runs_are_to_meet_the_wish():
    """Of 45 runs that three came before, two may stray; of a third the wish takes account."""
    assert slowed(1.1, {10, 20}).slack == pytest.approx(1.0)
    known = slowed(1.1, {10, 20, 30})
    assert known.slack == pytest.approx(1.1)
    assert choose(known, Wish(ms=1.1 * 120), request(), ABLE).tokens == 6
    assert choose(known, Wish(ms=1.1 * 120 - 0.01), request(), ABLE).tokens == 5


def test_a_machine_drifts_however_steady_its_calibration_was(monkeypatch):
    monkeypatch.setattr(predict, "STEADY", STEADY)
    assert made().slack == STEADY > 1.0
    assert choose(made(), Wish(ms=STEADY * 120), request(), ABLE).tokens == 6
    assert choose(made(), Wish(ms=STEADY * 120 - 0.01), request(), ABLE).tokens == 5


def test_a_machine_that_grows_slower_for_good_does_not_stray():
    """Half as fast from run 24 on: two runs stray, then the level is another."""
    assert slowed(2.0, set(range(24, 48))).slack == pytest.approx(1.0)


def test_a_machine_that_is_slower_now_gets_fewer_tokens():
    """5 + 1.1 x (100 + 1 + 8 + K) allows 3 of 128.3 ms."""
    assert choose(made(), Wish(ms=128.3), request(level=1.1), ABLE).tokens == 3


def test_memory_is_what_is_held_and_the_most_of_any_part():
    """100 MB of weights and 20 of the tower; the words and 13 tokens take 21 of the prefill,
    and 1 % is spare."""
    assert choose(made(), Wish(gb=0.1213), request(), ABLE).tokens == 13
    whole = forecast(made(), request(), N)
    assert whole.gb == pytest.approx((100 + 1.01 * 24) / 1000)


def test_a_long_answer_needs_room_in_the_cache():
    """3000 rows are allocated as 3072."""
    asked = request(answer=3000 - SHORT - 4)
    assert forecast(made(row_bytes=10_000), asked, 4).gb == pytest.approx(0.1 + 1.01 * 0.03072)


def test_of_two_wishes_the_narrower_decides():
    assert choose(made(), Wish(120, 0.1213), request(), ABLE).tokens == 6
    assert choose(made(), Wish(128, 0.1213), request(), ABLE).tokens == 13
    told = str(choose(made(), Wish(120, 0.1213), request(), ABLE))
    assert told.startswith("Budget: 120 ms and 0.1213 GB -> 6 of 16")


def test_it_is_said_when_the_tower_alone_takes_longer():
    choice = choose(made(), Wish(ms=90), request(), ABLE)
    assert choice.tokens == N and choice.options["pruner"] == "none"
    assert "cannot meet 90 ms, so nothing is pruned" in choice.why
    assert "the image and the vision tower alone take 105 ms" in choice.why
    assert "downsample" in choice.why


def test_it_is_said_when_one_token_is_too_many():
    choice = choose(made(), Wish(ms=110), request(), ABLE)
    assert choice.tokens == N
    assert "with 1 visual token it takes up to 115 ms" in choice.why
    inside = choose(made(in_tower=True), Wish(ms=90), request(), ABLE)
    assert "tower alone" not in inside.why and "downsample" not in inside.why


def test_it_is_said_when_the_weights_are_too_many():
    assert "weights alone take 0.100 GB" in choose(made(), Wish(gb=0.09), request(), ABLE).why
    least = choose(made(), Wish(gb=0.11), request(), ABLE).why
    assert "with 1 visual token it takes 0.120 GB" in least


def test_only_budgets_that_the_method_can_keep_are_chosen():
    assert choose(made(), Wish(ms=120), request(), range(3, N, 2)).tokens == 5
    assert choose(made(), Wish(ms=115), request(), range(3, N, 2)).why


@given(st.floats(50, 300), st.floats(0, 40), st.integers(1, 300), st.integers(1, 3))
def test_the_largest_k_that_fits_is_chosen_and_more_time_never_keeps_fewer(ms, more, text, images):
    known, asked = made(), request(text=text, images=images)
    first, second = (choose(known, Wish(ms=limit), asked, ABLE) for limit in (ms, ms + more))
    if not first.why:
        assert first.expected.meets(first.wish)
        assert not second.why and second.tokens >= first.tokens
    larger = range(1 if first.why else first.tokens + 1, N + 1)
    assert not any(forecast(known, asked, K).meets(first.wish) for K in larger)


@given(st.lists(st.floats(0, 1000), min_size=1, max_size=12))
def test_noise_never_makes_more_rows_quicker(values):
    fitted = rising(values)
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(fitted))
    assert sum(fitted) == pytest.approx(sum(values))
    assert rising(sorted(values)) == sorted(values)


def test_an_outcome_says_how_far_the_prediction_was_off():
    choice = choose(made(), Wish(120, 0.2), request(), ABLE)
    answer = Answer({"total": 114.0}, 0.12)
    assert choice.outcome(answer) == (
        "Budget met: 114 ms of 120 ms (predicted 120 ms, 5.0 % off), "
        "0.120 GB of 0.2 GB (predicted 0.120 GB, 0.2 % off)"
    )
    late = replace(choice, wish=Wish(ms=110))
    assert late.outcome(answer).startswith("Budget missed: 114 ms of 110 ms")
    told = choice.as_json(answer)
    assert told["off"]["ms"] == pytest.approx(-0.05) and told["met"] is True
    assert Forecast(1, 1, 1).meets(Wish(ms=1)) and not Forecast(1, 1, 1).meets(Wish(gb=0.9))


class Answer:
    """What an outcome reads of a result."""

    def __init__(self, ttft_ms: dict[str, float], peak_memory: float):
        self.ttft_ms, self.peak_memory = ttft_ms, peak_memory


# With a model.


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(tiny.reference(), folder)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module")
def loaded(home):
    return load(home / "mlx")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test, nothing remembered by the process, two runs of
    each point, and no run so slow that a calibration is not worth keeping."""
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(budgets, "_held", {})
    monkeypatch.setattr(budgets, "BUSY", math.inf)
    monkeypatch.setattr(calibrate, "MANY", 2)
    return tmp_path / "cache"


def asked_of(loaded, home, images: int = 1, prompt: str = QUESTION):
    return prepare(*loaded, prompt, [home / "a.png"] * images)


def test_of_a_decoder_method_only_averages_that_its_schedule_allows(loaded):
    """Three layers, the first of which holds all 16: an average of K leaves 3 K - 16 after it,
    of which two layers share, and one must be left."""
    model, _ = loaded
    assert able(model, plan("fastv")) == list(range(6, N))
    assert able(model, plan("norm")) == list(range(1, N))


def test_of_a_smaller_image_only_sizes_that_differ(loaded):
    model, _ = loaded
    assert able(model, plan("downsample")) == [1, 2, 4, 6, 9, 12]


@pytest.mark.parametrize("spec", ["norm", "tome", "downsample", "divprune", "fastv", "tome+fastv"])
def test_a_calibration_runs_from_the_least_k_to_all(loaded, home, spec):
    model, _ = loaded
    pipeline, asked = plan(spec), asked_of(loaded, home, images=2)
    known = measure(model, pipeline, asked)
    assert sorted(known.places) == sorted(design(model, pipeline, asked))
    assert {place.K for place in known.places} >= {able(model, pipeline)[0], model.N}
    assert {place.images for place in known.places} == {1, 2}
    assert known.in_tower == ("tome" in spec or spec == "downsample")
    assert all(set(r.ms) == set(r.nbytes) == set(PARTS) for r in known.runs)
    assert known.nbytes(model.N, SHORT, 1)["prefill"] > 0
    ms = known.ms(8, 20, 1)
    assert min(ms["vision"], ms["prefill"]) > 0
    assert (ms["pruner"] > 0) == (spec not in ("tome", "downsample"))  # those are in the tower's


def test_a_calibration_is_remembered_number_for_number(loaded, home, cache):
    model, processor = loaded
    asked, pipeline = asked_of(loaded, home), plan("norm")
    known = calibrated(model, processor.folder, pipeline, asked)
    (file,) = (cache / "calibrations").iterdir()
    again = read(file, about(model))
    assert again and again.runs == known.runs
    assert (again.pruner, again.N, again.row_bytes) == (known.pruner, known.N, known.row_bytes)
    assert again.ms(5, 11, 1) == known.ms(5, 11, 1) and again.slack == known.slack


def test_what_is_remembered_is_not_measured_again(loaded, home, cache, monkeypatch):
    model, processor = loaded
    asked, pipeline = asked_of(loaded, home), plan("norm")
    path = remember(loaded, home, cache)
    monkeypatch.setattr(budgets, "measure", never)
    known = calibrated(model, processor.folder, pipeline, asked)
    assert known == read(path, about(model))
    monkeypatch.setattr(budgets, "read", never)  # the process remembers, too
    assert calibrated(model, processor.folder, pipeline, asked) is known


def never(*_):
    raise AssertionError("this was to be remembered")


def remember(loaded, home, cache):
    """The file of a new calibration, which this process then forgets."""
    model, processor = loaded
    calibrated(model, processor.folder, plan("norm"), asked_of(loaded, home))
    budgets._held.clear()
    (file,) = (cache / "calibrations").iterdir()
    return file


def without(key: str):
    return lambda told: json.dumps({k: v for k, v in told.items() if k != key})


DAMAGE = {
    "empty": lambda told: "",
    "cut off": lambda told: json.dumps(told)[:200],
    "no object": lambda told: "[1, 2]",
    "nested without end": lambda told: "[" * 100_000,
    "no runs": lambda told: json.dumps({**told, "runs": []}),
    "few runs": lambda told: json.dumps({**told, "runs": told["runs"][:1]}),
    "a part missing": without("runs"),
    "not a number": lambda told: json.dumps(told).replace('"vision": ', '"vision": NaN, "was": '),
    "no time": lambda told: json.dumps(told).replace('"vision": ', '"vision": -1, "was": '),
    "words for numbers": lambda told: json.dumps({**told, "N": "sixteen"}),
    "another version": lambda told: json.dumps({**told, "about": {**told["about"], "versions": 0}}),
    "another format": lambda told: json.dumps({**told, "format": 0}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_old_calibration_is_made_anew(loaded, home, cache, case):
    model, processor = loaded
    file = remember(loaded, home, cache)
    file.write_text(DAMAGE[case](json.loads(file.read_text())))
    assert read(file, about(model)) is None
    calibrated(model, processor.folder, plan("norm"), asked_of(loaded, home))
    assert read(file, about(model)) is not None


def test_of_another_machine_the_calibration_is_made_anew(loaded, home, cache):
    """As of one that was a thousand times as fast: probing it finds out."""
    model, processor = loaded
    file = remember(loaded, home, cache)
    told = json.loads(file.read_text())
    for one in told["runs"]:
        one["ms"] = {part: ms / 1000 for part, ms in one["ms"].items()}
    file.write_text(json.dumps(told))
    old = read(file, about(model))
    picture = home / "a.png"
    choice = keep_within(model, processor, QUESTION, picture, pruner="norm", ms=1e9)
    new = read(file, about(model))
    assert old and new and old.runs != new.runs
    assert choice.asked.level < 1000 / budgets.LIKE


@pytest.mark.parametrize("more", [{"images": 2}, {"prompt": "star " * 150}])
def test_more_images_or_words_than_were_measured_are_measured(loaded, home, cache, more):
    model, processor = loaded
    remember(loaded, home, cache)
    asked = asked_of(loaded, home, **more)
    known = calibrated(model, processor.folder, plan("norm"), asked)
    assert known.longest >= asked.text and known.most_images == len(asked.visible)


def test_a_cache_that_cannot_be_written_is_said_and_fails_nothing(loaded, home, cache, capsys):
    cache.write_text("a file where the folder would be")
    calibrated(loaded[0], loaded[1].folder, plan("norm"), asked_of(loaded, home))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "note:" in x]
    assert "cannot be kept" in line and str(cache) in line


def test_a_busy_machine_is_not_remembered(loaded, home, cache, monkeypatch, capsys):
    busy = slowed(3.0, set(range(5, 48, 5)))
    monkeypatch.setattr(budgets, "measure", lambda *_: busy)
    monkeypatch.setattr(budgets, "BUSY", 1.5)
    calibrated(loaded[0], loaded[1].folder, plan("norm"), asked_of(loaded, home))
    assert "3.0 x as long as usual" in capsys.readouterr().err
    assert not cache.exists()


def test_a_model_without_a_folder_is_calibrated_and_not_remembered(loaded, home, cache):
    model, processor = loaded
    processor = replace(processor, folder=None)
    picture = home / "a.png"
    choice = keep_within(model, processor, QUESTION, picture, pruner="norm", ms=1e9)
    assert choice.tokens == model.N and not cache.exists()


def test_learned_pools_and_budgets_of_each_image_are_refused():
    with pytest.raises(UserError, match="attention_pool was trained for 5 visual tokens"):
        check(Pool())
    with pytest.raises(UserError, match="leave out dynamic"):
        check(plan("norm+restore", {}).of(Dynamic()))


class Pool:
    name, trained_tokens, steps = "attention_pool", 5, ()


class Dynamic:
    name = spec = "mlp:dynamic"
    has_dynamic_budget, trained_tokens = True, None


# The command line.


def command(home, *more: str) -> list[str]:
    picture = ["--image", str(home / "a.png")]
    return ["--model", str(home / "mlx"), "-p", QUESTION, *picture, "--max-tokens", "3", *more]


def test_the_prediction_comes_before_the_answer_and_the_outcome_after(
    loaded, home, capsys, monkeypatch, tmp_path
):
    """As if all took seconds instead of milliseconds: opening the image does not matter then."""
    slow = [replace(r, ms={part: 1000 * ms for part, ms in r.ms.items()}) for r in USUAL]
    monkeypatch.setattr(budgets, "measure", lambda *_: made(*slow))
    monkeypatch.setattr(budgets, "present", lambda *_: 1.0)
    ms = 101_000 + 1000 * (asked_of(loaded, home).text + 6) + 900
    file = tmp_path / "a.json"
    main(command(home, "--pruner", "norm", "--budget-ms", str(ms), "--json", str(file)))
    out = capsys.readouterr().out.splitlines()
    told = json.loads(file.read_text())
    assert told["visual_tokens_kept"] == told["budget"]["tokens"] == 6
    assert out[0].startswith(f"Budget: {ms} ms -> 6 of 16 visual tokens, predicted ")
    starts = ("Prompt: ", "Generation: ", "Peak memory: ", "Visual tokens: ", "Time to first token")
    figures = out[-6:-1]
    assert all(line.startswith(start) for line, start in zip(figures, starts, strict=True))
    assert out[-1].startswith("Budget met: ") and out[-1].endswith(" % off)")
    keys = {"wish", "level", "pruner", "tokens", "of", "predicted", "why_not", "took", "off", "met"}
    assert told["budget"].keys() == keys
    assert told["budget"]["took"]["ms"] == told["ttft_ms"]["total"]


def test_a_wish_that_cannot_be_met_is_answered_unpruned(home, capsys):
    main(command(home, "--pruner", "norm", "--budget-ms", "0.001"))
    out, err = capsys.readouterr()
    assert "note: pruning with norm cannot meet 0.001 ms, so nothing is pruned" in err
    assert "Visual tokens: 16 -> 16 (0.0% pruned)" in out
    assert "Budget missed: " in out


def test_a_generous_wish_keeps_all_tokens(home, capsys):
    main(command(home, "--pruner", "norm", "--budget-ms", "1e9", "--budget-gb", "1e3", "--compare"))
    out, err = capsys.readouterr()
    assert "Budget: 1e+09 ms and 1000 GB -> 16 of 16 visual tokens" in out
    assert "Budget met: " in out and "note:" not in err


BAD = {
    "with a ratio": (["--pruner", "norm", "--budget-ms", "9", "--keep-ratio", "0.5"], "leave out"),
    "with tokens": (["--pruner", "norm", "--budget-gb", "9", "--keep-tokens", "5"], "leave out"),
    "without a pruner": (["--budget-ms", "9"], "needs a --pruner"),
    "with none": (["--pruner", "none", "--budget-ms", "9"], "other than none"),
    "no time": (["--pruner", "norm", "--budget-ms", "0"], "--budget-ms is 0.0"),
    "not a number": (["--pruner", "norm", "--budget-ms", "nan"], "above 0"),
    "less than no memory": (["--pruner", "norm", "--budget-gb", "-1"], "--budget-gb is -1.0"),
    "endless": (["--pruner", "norm", "--budget-gb", "inf"], "above 0"),
    "too shallow": (["--pruner", "fastv:layer=9", "--budget-ms", "9"], "layers 0 to 2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wish_that_makes_no_sense_is_refused_in_one_sentence(home, capsys, case):
    flags, part = BAD[case]
    with pytest.raises(SystemExit) as stop:
        main(command(home, *flags))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    (line,) = [x for x in err.splitlines() if "error:" in x]
    assert part in line


def test_a_wish_without_an_image_is_refused(home, capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(home / "mlx"), "-p", "hi", "--pruner", "norm", "--budget-ms", "9"])
    assert "needs an --image" in capsys.readouterr().err


def test_peak_memory_is_predicted_as_it_is_reported(loaded, home):
    """Bytes do not depend on how busy a machine is: within 5 % at a K that was not measured."""
    model, processor = loaded
    picture, options = home / "a.png", {"pruner": "norm", "max_tokens": 4}
    asked = keep_within(model, processor, QUESTION, picture, gb=1, **options).asked
    known = calibrated(model, processor.folder, plan("norm"), asked_of(loaded, home))
    for K in (3, 10):
        took = generate(model, processor, QUESTION, picture, keep_tokens=K, **options)
        assert forecast(known, asked, K).gb == pytest.approx(took.peak_memory, rel=0.05)
