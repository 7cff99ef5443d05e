"""Figures are means by each format's rule, and 95 % intervals hold the truth as often as stated.

Shapes: G groups, S simulated sets.
"""

import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation import bootstrap
from mlx_vlm_prune.evaluation.bootstrap import FEWEST, interval, resampled
from mlx_vlm_prune.evaluation.judge import AnswerTable, Judge
from mlx_vlm_prune.evaluation.questions import Question, format_of
from mlx_vlm_prune.evaluation.table import mark, table

NO_PICTURE = b""


@pytest.fixture(autouse=True)
def _few_are_enough(monkeypatch):
    monkeypatch.setattr(bootstrap, "FEWEST", 1)


def questions_of(*fields: tuple[str, str, str]) -> list[Question]:
    """Questions from (kind, group, right answer)."""
    return [
        Question(f"{n}", "?", (right,), NO_PICTURE, kind, group)
        for n, (kind, group, right) in enumerate(fields)
    ]


def rows_of(name: str, questions, *responses: list[str], loyal=None, logprob=None, random=None):
    """Rows of figures; the first method is full."""
    shape = (len(responses), len(questions))
    loyal = np.ones(shape, bool) if loyal is None else np.array(loyal)
    logprob = np.zeros(shape) if logprob is None else np.array(logprob)
    answers = AnswerTable(questions, list(responses), loyal, logprob)
    judge = Judge(format_of(name), questions, seed=0)
    return judge.rows(answers, 0, random or [None] * len(responses))


def coverage(drawn_RS: np.ndarray, truth: float) -> float:
    """The share of simulated sets whose interval holds the truth."""
    bounds = [interval(0.0, column, FEWEST)[1:] for column in drawn_RS.T]
    return float(np.mean([low <= truth <= high for low, high in bounds]))


def test_nine_of_ten_intervals_hold_the_truth_and_more_at_nominal_95():
    """Two methods that mostly fail on the same questions, 150 a set."""
    G, S, rng = 150, 600, np.random.default_rng(1)
    easy_GS = rng.random((G, S)) < 0.7
    a_GS, b_GS = (easy_GS ^ (rng.random((G, S)) < flip) for flip in (0.1, 0.2))
    truth = (0.7 * 0.9 + 0.3 * 0.1) - (0.7 * 0.8 + 0.3 * 0.2)
    difference_GS = a_GS.astype(float) - b_GS
    drawn = resampled(difference_GS, np.ones(G), np.random.default_rng(2))
    assert 0.90 <= coverage(drawn, truth) <= 0.99
    unpaired_GS = rng.permuted(a_GS, axis=0).astype(float) - b_GS
    unpaired = resampled(unpaired_GS, np.ones(G), np.random.default_rng(2))
    width, unpaired_width = drawn.std(axis=0).mean(), unpaired.std(axis=0).mean()
    assert width < 0.8 * unpaired_width


def test_intervals_of_means_over_questions_hold_the_truth_where_groups_differ_in_size():
    """Questions of a group go right or wrong together more often than not."""
    G, S, rng = 120, 400, np.random.default_rng(3)
    size_G = rng.integers(1, 5, G)
    easy_GS = rng.random((G, S)) < 0.5
    sum_GS = rng.binomial(size_G[:, None], np.where(easy_GS, 0.9, 0.3)).astype(float)
    drawn = resampled(sum_GS, size_G, np.random.default_rng(4))
    assert 0.90 <= coverage(drawn, 0.6) <= 0.99


def test_resampled_differences_are_differences_of_resampled_means_and_repeat_with_a_seed():
    rng = np.random.default_rng(0)
    a_G, b_G, ones_G = rng.random(40), rng.random(40), np.ones(40)
    both = resampled(np.stack([a_G, b_G, a_G - b_G], axis=1), ones_G, np.random.default_rng(7))
    np.testing.assert_allclose(both[:, 0] - both[:, 1], both[:, 2], atol=1e-12)
    again = resampled((a_G - b_G)[:, None], ones_G, np.random.default_rng(7))
    np.testing.assert_allclose(again[:, 0], both[:, 2], atol=1e-12)
    assert interval(0.5, np.zeros(10), FEWEST) == [0.5, 0.0, 0.0]


def test_a_handful_of_groups_has_no_interval(monkeypatch):
    """The interval of one question would have no width."""
    monkeypatch.setattr(bootstrap, "FEWEST", FEWEST)
    assert interval(0.5, np.full(10, 0.5), FEWEST - 1) == [0.5, None, None]
    questions = questions_of(*[("all", "", "yes")] * (FEWEST - 1))
    full, other = ["yes"] * (FEWEST - 1), ["no"] * (FEWEST - 1)
    row = rows_of("own", questions, full, other)[1]
    assert row["to_full"]["overall"] == [-1.0, None, None]
    assert mark({"to_random": row["to_full"]}) == " "


def test_many_groups_are_drawn_in_pieces(monkeypatch):
    values = np.arange(50.0)[:, None]
    at_once = resampled(values, np.ones(50), np.random.default_rng(0), resamples=64)
    monkeypatch.setattr("mlx_vlm_prune.evaluation.bootstrap.MOST_COUNTS", 500)
    pieces = resampled(values, np.ones(50), np.random.default_rng(0), resamples=64)
    assert at_once.shape == pieces.shape == (64, 1)
    assert abs(pieces.mean() - 24.5) < 1.5 and pieces.std() == pytest.approx(
        np.arange(50).std() / np.sqrt(50), rel=0.3
    )


def test_kinds_are_means_of_their_own_questions_and_overall_is_the_mean_of_all():
    questions = questions_of(*[("a", "", "yes")] * 3, ("b", "", "yes"))
    full, worse = ["yes"] * 4, ["yes", "no", "Yes.", "no"]
    first, second = rows_of("own", questions, full, worse, loyal=[[1] * 4, [1, 0, 1, 0]],
                            logprob=[[-1, -1, -1, -1], [-1, -2, -3, -4]])  # fmt: skip
    assert first["accuracy"] == {"a": 1.0, "b": 1.0} and first["loyalty"] == 1.0
    assert second["accuracy"] == {"a": 0.6667, "b": 0.0}
    assert (second["overall"], second["loyalty"], second["logprob"]) == (0.5, 0.5, -2.5)
    assert second["to_full"]["overall"][0] == -0.5 and second["to_full"]["logprob"][0] == -1.5
    assert second["to_full"]["a"][0] == -0.3333 and second["to_full"]["b"] == [-1.0, -1.0, -1.0]
    assert first["to_full"]["overall"] == [0.0, 0.0, 0.0] and "to_random" not in first


def test_right_holds_a_bit_a_question():
    responses = ["yes" if c == "1" else "no" for c in "101100001"]
    (row,) = rows_of("own", questions_of(*[("all", "", "yes")] * 9), responses)
    assert row["right"] == "b080"


def test_mme_counts_an_image_twice_where_both_answers_are_right_and_sums_its_kinds():
    questions = questions_of(
        ("count", "1", "yes"), ("count", "1", "no"), ("count", "2", "yes"), ("count", "2", "no"),
        ("color", "1", "yes"), ("color", "1", "no"),
    )  # fmt: skip
    full = ["Yes", "No", "Yes", "No", "Yes", "No"]
    other = ["Yes", "No", "Yes", "Yes", "No", "Yes"]
    first, second = rows_of("mme", questions, full, other)
    assert first["accuracy"] == {"count": 200.0, "color": 200.0} and first["overall"] == 400.0
    # count: the first image 1 + 1, the second 1/2 + 0, in the mean 1.25
    assert second["accuracy"] == {"count": 125.0, "color": 0.0} and second["overall"] == 125.0
    assert second["to_full"]["overall"][0] == -275.0
    assert second["to_full"]["color"] == [-200.0, -200.0, -200.0]
    low, high = second["to_full"]["count"][1:]
    assert second["to_full"]["overall"][1:] == [low - 200, high - 200]  # kinds drawn on their own
    assert second["more"] == {"perception": 125.0}


def test_mmbench_counts_a_question_only_where_every_rotation_is_right():
    questions = questions_of(("k", "1", "A"), ("k", "1", "B"), ("k", "2", "A"), ("k", "2", "B"))
    questions = [Question(**{**vars(q), "scoring_data": ("red", "blue")}) for q in questions]
    full, other = ["A", "B", "A", "B"], ["A", "B", "A", "A"]
    _, row = rows_of("mmbench", questions, full, other, loyal=[[1] * 4, [1, 1, 1, 0]])
    assert row["overall"] == 0.5 and row["loyalty"] == 0.75
    assert row["to_full"]["overall"] == [-0.5, -1.0, 0.0]  # two groups, not four questions


def test_loyalty_is_a_mean_over_questions_whatever_their_groups():
    questions = questions_of(("k", "1", "A"), ("k", "1", "B"), ("k", "1", "C"), ("k", "2", "A"))
    _, row = rows_of("own", questions, ["x"] * 4, ["x"] * 4, loyal=[[1] * 4, [1, 1, 1, 0]],
                     logprob=[[0.0] * 4, [-1, -2, -3, -6]])  # fmt: skip
    assert row["loyalty"] == 0.75 and row["logprob"] == -3.0
    assert row["overall"] == 0.0


def test_equal_kinds_are_not_drawn_alike_where_they_are_summed():
    """Drawn alike, the sum of two equal kinds would have twice the interval of one."""
    fields = [(kind, f"{n}", "yes") for kind in ("count", "color") for n in range(60)]
    responses = ["yes" if n % 2 else "no" for n in range(60)] * 2
    _, row = rows_of("mme", questions_of(*fields), ["yes"] * 120, responses)
    one, both = (row["to_full"][name][2] - row["to_full"][name][1] for name in ("count", "overall"))
    assert both / one == pytest.approx(2**0.5, rel=0.15)


def test_the_majority_is_each_kinds_most_frequent_answer():
    questions = questions_of(*[("a", "", x) for x in ("yes", "no", "no")], ("b", "", "red"))
    assert Judge(format_of("own"), questions, 0).majority() == {"a": 0.6667, "b": 1.0}


def test_a_kind_cannot_have_the_name_of_a_figure():
    with pytest.raises(UserError, match="loyalty"):
        Judge(format_of("own"), questions_of(("loyalty", "", "yes")), 0)


def result_of(rows, **more):
    return {"rows": rows, "unit": "%", "kinds": {"a": 4, "b": 4}, "count": 8, "format": "own",
            "refused": [], "skipped": []} | more  # fmt: skip


def row(pruner: str, tokens: int, overall: float, to_random=None, **more):
    figures = {"overall": overall, "loyalty": 0.5, "logprob": -1.25}
    compared = {} if to_random is None else {"to_random": {"overall": to_random}}
    kinds = {"accuracy": {"a": overall, "b": 1.0}}
    return {"pruner": pruner, "tokens": tokens, **figures, **kinds, **compared, **more}


def test_the_table_has_the_best_first_at_every_budget_and_marks_differences_to_random():
    rows = [
        row("none", 16, 1.0),
        row("random", 8, 0.5),
        row("norm", 8, 0.25, [-0.25, -0.4, -0.1]),
        row("tome", 8, 0.75, [0.25, 0.1, 0.4]),
        row("uniform", 8, 0.5, [0, -0.1, 0.1]),
    ]
    why = [{"pruner": "fastv", "tokens": 4, "why": "fastv: cannot keep 4 of 16"}]
    lines = table(result_of(rows, refused=why, skipped=["line 3: no answer"])).splitlines()
    assert lines[0].split() == ["pruner", "tokens", "overall", "a", "b", "loyalty", "log-prob"]
    assert [line.split()[0] for line in lines[2:8] if line] == [
        "none", "tome", "random", "uniform", "norm",
    ]  # fmt: skip
    assert lines[4].split() == ["tome", "8", "75.0▲", "75.0", "100.0", "50.0", "-1.250"]
    assert lines[7].split()[2] == "25.0▼" and lines[6].split()[2] == "50.0"
    assert "Worse than random: norm (8)." in lines
    assert "Not asked: fastv with 4 tokens: cannot keep 4 of 16" in lines
    assert lines[-1] == "Skipped: line 3: no answer"
    ends = {len(line.rstrip("▲▼ ")) for line in lines[2:8] if line}
    assert len(ends) == 1, "columns stand under one another"


def test_many_kinds_are_not_in_the_table_and_points_are_not_in_percent():
    kinds = {f"kind {n}": 2 for n in range(14)}
    rows = [row("none", 16, 1234.5, more={"perception": 1000.0})]
    text = table(result_of(rows, kinds=kinds, unit=""))
    assert "kind 1" not in text and "The 14 kinds" in text
    assert text.splitlines()[2].split() == ["none", "16", "1234.5", "1000.0", "50.0", "-1.250"]
