"""`--compare`: several runs in turns, the pictures' opening apart, no gain that noise explains."""

import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from mlx_vlm_prune.generate import main
from mlx_vlm_prune.generation import comparison
from mlx_vlm_prune.generation.comparison import (
    DRAFTED,
    FULL,
    NOT_DRAWN,
    PRUNED,
    Comparison,
    RunTimes,
    compare,
    compared_overlay,
    comparison_lines,
    ways_to_answer,
)
from mlx_vlm_prune.scenes import compose

DRAWN = Image.new("RGB", (60, 40))


def answers(ms: dict[str, list[float]], opening: float = 100.0):
    """An `answer` whose n-th run of each way takes so many milliseconds behind the opening."""
    runs, order = {way: iter(times) for way, times in ms.items()}, []

    def answer(way: str, max_tokens: int = 9) -> SimpleNamespace:
        order.append((way, max_tokens))
        total = opening + next(runs[way])
        return SimpleNamespace(ttft_ms={"image": opening, "total": total}, generation_tokens=3)

    return answer, order


def compared(monkeypatch, full: list[float], pruned: list[float]) -> str:
    monkeypatch.setattr(comparison, "SECONDS", 0)
    answer, _ = answers({"a": full, "b": pruned})
    return "\n".join(compare(answer, {FULL: {"way": "a"}, PRUNED: {"way": "b"}}).lines)


def test_a_gain_is_the_median_of_neighbours_without_the_pictures_opening(monkeypatch):
    text = compared(monkeypatch, [80.0, 84.0, 82.0], [40.0, 40.0, 40.0])
    assert "Opening the pictures: 100.0 ms, with or without pruning" in text
    line = "All visual tokens 82.0 ms -> Pruned 40.0 ms, 2.05 x as fast (2.00 to 2.10 in 3 turns)"
    assert f"Time to first token from there: {line}" in text


def test_a_gain_that_its_spread_explains_is_no_clear_difference(monkeypatch):
    text = compared(monkeypatch, [80.0, 40.0, 40.0], [40.0, 60.0, 40.0])
    assert "40.0 ms, no clear difference (0.67 to 2.00 x as fast in 3 turns)" in text


def test_a_gain_of_every_turn_is_said_to_be_one_though_it_varies(monkeypatch):
    text = compared(monkeypatch, [80.0, 80.0, 80.0], [40.0, 64.0, 60.0])
    assert "x as fast in 3 turns, too much spread for one figure" in text


def test_two_turns_that_agree_may_be_an_accident(monkeypatch):
    run = comparison.RunTimes
    ways = {FULL: [run(1, 80, 80, 1)] * 2, PRUNED: [run(1, 40, 40, 1)] * 2}
    two = comparison.Comparison(ways)
    line = "80.0 ms -> Pruned 40.0 ms, 2.00 to 2.00 x as fast in 2 turns, too few turns for one"
    assert line in "\n".join(two.lines)
    assert two.as_json()["gain"][PRUNED]["first_token"]["median"] is None
    three = comparison.Comparison({way: [*runs, runs[0]] for way, runs in ways.items()})
    assert three.as_json()["gain"][PRUNED]["first_token"]["median"] == 2


def test_the_picture_shows_both_answers_and_their_times(monkeypatch):
    captions = []
    monkeypatch.setattr(comparison, "add_caption", lambda _, text: captions.append(text) or DRAWN)

    def answer(text: str, kept: int) -> SimpleNamespace:
        return SimpleNamespace(text=text, visual_tokens=196, overlay=lambda caption: DRAWN,
                               caption=lambda: f"norm: 196 -> {kept}")  # fmt: skip

    def lines(text: str, *ms: float) -> list[list[str]]:
        captions.clear()
        pair = {FULL: answer("a long answer\n" * 20, 196), PRUNED: answer(text, 49)}
        full = [RunTimes(1, each, each, 1) for each in (80, 90, 100)][: len(ms)]
        runs = {FULL: full, PRUNED: [RunTimes(1, each, each, 1) for each in ms]}
        assert compared_overlay(pair, Comparison(runs)).width > 2 * DRAWN.width
        return [caption.split("\n") for caption in captions]

    full, pruned = lines("yes", 40, 45, 50)
    assert full[0].startswith('All visual tokens: "a long answer a long') and full[0][-3:] == ' …"'
    assert len(full[0]) < 145 and full[1:] == ["first token after 90 ms", "196 visual tokens"]
    assert pruned[0] == 'Pruned: "yes"' and pruned[2] == "norm: 196 -> 49"
    assert pruned[1] == "first token after 45 ms, 2.00 to 2.00 x as fast"
    assert lines("yes", 40, 45, 200)[1][1] == "first token after 45 ms, no clear difference"
    assert lines("yes", 40)[1][1] == "first token after 40 ms"  # one run shows no gain
    for text in ("好", "好" * 200):  # the font has no such letters
        assert lines(text, 40)[1][0] == f"Pruned: {NOT_DRAWN}"


def test_the_picture_has_every_answer_and_every_image(tmp_path, monkeypatch, capsys):
    photo, file = tmp_path / "photo.png", tmp_path / "kept.png"
    compose(0).image().save(photo)
    parts, add = [], comparison.add_caption
    monkeypatch.setattr(
        comparison,
        "add_caption",
        lambda image, text: parts.append((image.width, text.split(":")[0])) or add(image, text),
    )
    command = ["--prompt", "How many shapes are there?", "--pruner", "twig", "--keep-tokens", "98"]
    command += ["--num-draft-tokens", "2", "--max-tokens", "2", "--compare"]
    for images in ([photo], [photo, photo]):
        main([*command, "--image", *map(str, images), "--overlay", str(file)])
    capsys.readouterr()
    with Image.open(file) as picture:
        assert picture.width >= sum(width for width, _ in parts[3:])
    assert [way for _, way in parts] == [FULL, PRUNED, DRAFTED] * 2
    assert parts[3][0] > 2 * parts[0][0] > 0  # both images beside each other


def test_ways_take_turns_for_two_seconds_and_at_least_three_times(monkeypatch):
    now = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: 0.1 * next(now))
    monkeypatch.setattr(comparison, "time", clock)
    answer, order = answers({"a": [1.0] * 99, "b": [1.0] * 99})
    ways = {FULL: {"way": "a"}, PRUNED: {"way": "b"}}
    compare(answer, ways)
    # A tenth of a second at each look at the clock: of a run two, and one after each round.
    assert order == [("a", 1), ("b", 1)] * 4
    monkeypatch.setattr(comparison, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    order.clear()
    compare(answer, ways)
    assert order == [("a", 1), ("b", 1)] * 3


def test_rounds_that_take_long_are_fewer_and_it_is_said_beforehand(monkeypatch, caplog):
    now = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: 2 * next(now))
    monkeypatch.setattr(comparison, "time", clock)
    answer, order = answers({"a": [1.0] * 99, "b": [0.5] * 99})
    with caplog.at_level("INFO", "mlx_vlm_prune"):
        timed = compare(answer, {FULL: {"way": "a"}, PRUNED: {"way": "b"}})
    assert order == [("a", 1), ("b", 1)] * 2  # three would take more than half a minute
    assert "2 turns, too few turns for one figure" in timed.lines[1]
    assert [record.message for record in caplog.records] == [
        "comparing takes about 24 s: 2 rounds"
    ]  # fmt: skip


def test_answers_that_are_timed_to_their_ends_are_short(monkeypatch):
    monkeypatch.setattr(comparison, "SECONDS", 0)
    answer, order = answers({way: [1.0] * 3 for way in "abc"})
    ways = {FULL: {"way": "a", "max_tokens": 500}, PRUNED: {"way": "b", "max_tokens": 500},
            DRAFTED: {"way": "c", "max_tokens": 500}}  # fmt: skip
    lines = compare(answer, ways).lines
    assert order == [("a", 48), ("b", 48), ("c", 48)] * 3
    assert [line.startswith("Answer of at most 48 tokens from there: ") for line in lines[2:]] == [
        True
    ] * 3
    order.clear()
    answer, order = answers({way: [1.0] * 3 for way in "abc"})
    ways = {title: {**options, "max_tokens": 7} for title, options in ways.items()}
    assert "Answer of at most 7 tokens from there" in compare(answer, ways).lines[-1]


def test_with_drafts_there_are_three_answers_to_their_ends():
    options, budget = {"num_draft_tokens": 5, "seed": 0}, {"pruner": "twig", "keep_tokens": 98}
    ways = ways_to_answer(options, budget, True)
    assert ways == {
        FULL: {"num_draft_tokens": None, "seed": 0, "pruner": "none"},
        PRUNED: {"num_draft_tokens": None, "seed": 0, **budget},
        DRAFTED: {"num_draft_tokens": 5, "seed": 0, **budget},
    }
    assert [*ways_to_answer({"num_draft_tokens": None}, budget, True)] == [FULL, PRUNED]
    assert ways_to_answer(options, budget, False) == {"": options | budget}


def test_the_last_line_tells_whether_the_answers_agree(monkeypatch):
    monkeypatch.setattr(comparison, "SECONDS", 0)
    answer, _ = answers({"a": [2.0] * 3, "b": [1.0] * 3})
    timed = compare(answer, {FULL: {"way": "a"}, PRUNED: {"way": "b"}})
    one, other = (
        SimpleNamespace(token_ids=ids, visual_tokens=196, visual_tokens_kept=98)
        for ids in ([1], [2])
    )
    last = "answer with 98 of 196 visual tokens"
    assert comparison_lines([one, one], timed)[-1] == f"Answer: the same {last}"
    assert comparison_lines([one, other], timed)[-1] == f"Answer: another {last}"


@pytest.mark.parametrize("drafts", [[], ["--num-draft-tokens", "5"]], ids=["plain", "drafts"])
def test_the_command_shows_what_pruning_gains_and_what_drafts_gain(
    tmp_path, monkeypatch, capsys, drafts
):
    monkeypatch.setattr(comparison, "SECONDS", 0.2)
    compose(1_000_000_007).image().save(tmp_path / "a.png")
    file = tmp_path / "a.json"
    main(["--image", str(tmp_path / "a.png"), "--prompt", "What does the sign say?", "--pruner",
          "twig", "--keep-tokens", "98", "--compare", "--json", str(file), *drafts])  # fmt: skip
    out, figures = capsys.readouterr().out, json.loads(file.read_text())
    titles = [line for line in out.splitlines() if line.startswith("=" * 10 + " ")]
    ways = [FULL, PRUNED, *([DRAFTED] if drafts else [])]
    assert titles == [f"{'=' * 10} {name}" for name in (*ways, "Full and pruned")]
    assert re.search(r"^Time to first token from there: .* turns", out, re.M)
    whole = re.findall(
        r"^Answer of at most \d+ tokens from there: (.+?) [\d.]+ ms .*-> (.+?) [\d.]+ ms", out, re.M
    )
    pairs = [(FULL, PRUNED), (FULL, DRAFTED), (PRUNED, DRAFTED)]
    assert whole == (pairs if drafts else [])
    assert figures["full"]["drafted"] is None and (figures["drafted"] is None) is not bool(drafts)
    assert ("pruned" in figures) == bool(drafts)
    measured = figures["comparison"]
    assert [*measured["ms"]] == ways and measured["opening_ms"] > 0
    assert {*measured["gain"]} == {*ways[1:]}
