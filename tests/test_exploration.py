"""Promises of what an exploration holds: the tokens that `generate` kept, their scores and ranks.

And of its page: in it nothing that a stranger wrote is executed.

Shapes: N visual tokens of an image, K kept.
"""

import json
from html.parser import HTMLParser

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generation.exploration import Exploration, ExploredAnswer, ranks
from mlx_vlm_prune.generation.printing import as_json
from mlx_vlm_prune.generation.result import GenerationResult
from mlx_vlm_prune.pruners.contract import Reduction
from mlx_vlm_prune.pruners.trace import ReductionStep, Trace
from mlx_vlm_prune.scenes import compose

PROMPT, IMAGE = "What does the sign say?", compose(seed=1_000_000_007).image()
N = 196
HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<!--<script>", "]]>", "\u2028window.pwned = 1", "{{script}} {{data}}", "\udcff &amp; \"'`",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load()


@pytest.fixture(scope="module")
def answer(model):
    """Answers by method and budget, each made once."""
    known: dict[tuple[str, int], GenerationResult] = {}

    def get(pruner: str, K: int = N, images=IMAGE) -> GenerationResult:
        if (pruner, K) not in known or images is not IMAGE:
            result = generate(
                *model, PROMPT, images, pruner=pruner, keep_tokens=K, max_tokens=3
            )  # fmt: skip
            if images is not IMAGE:
                return result
            known[pruner, K] = result
        return known[pruner, K]

    return get


def row_of(result: GenerationResult) -> dict:
    (row,) = result.explore().as_json()["answers"]
    return row


@pytest.mark.parametrize(
    ("pruner", "K"),
    [("norm", 49), ("divprune", 49), ("tome", 98), ("prumerge", 49), ("fastv", 98),
     ("tome+divprune", 49), ("cls_attention+sparsevlm", 98), ("none", N)],
)  # fmt: skip
def test_the_last_step_keeps_what_the_json_of_generate_says(answer, pruner, K):
    result = answer(pruner, K)
    row, written = row_of(result), as_json(result)
    assert [row["steps"][-1]["views"][0]["kept"]] == written["kept_indices"] == row["kept_indices"]
    by_layer = {run["first"]: run["kept_indices"][0] for run in written["layers"]}
    for step in row["steps"]:
        if step["layer"]:
            assert step["views"][0]["kept"] == by_layer[step["layer"]]


def test_patches_go_to_the_slots_that_stand_for_them(answer):
    result = answer("tome", 98)
    view = row_of(result)["steps"][-1]["views"][0]
    slot, size = np.array(view["slot"]), view["size"]
    assert len(view["kept"]) == len(size) == 98 and sum(size) == N and slot.min() == 0
    assert [int((slot == k).sum()) for k in range(98)] == size
    assert all(slot[index] == k for k, index in enumerate(view["kept"]))


@pytest.mark.parametrize("pruner", ["norm", "cls_attention", "received_attention", "hiprune"])
def test_the_best_ranks_are_those_that_were_kept(answer, pruner):
    view = row_of(answer(pruner, 49))["steps"][-1]["views"][0]
    rank = np.array(view["rank"])
    assert sorted(np.flatnonzero(rank <= 49).tolist()) == view["kept"]
    assert sorted(rank.tolist()) == list(range(1, N + 1)) and len(view["score"]) == N


def test_scores_in_the_decoder_are_of_those_that_were_still_there(answer):
    steps = row_of(answer("cls_attention+fastv", 49))["steps"]
    before, last = (step["views"][0] for step in steps[-2:])
    present = {i for i, score in enumerate(last["score"]) if score is not None}
    assert present == set(before["kept"]) > set(last["kept"])
    kept_ranks = [last["rank"][i] for i in last["kept"]]
    assert sorted(kept_ranks) == list(range(1, len(last["kept"]) + 1))
    assert {last["rank"][i] for i in range(N) if i not in present} == {0}


def test_a_method_that_ranks_no_single_token_has_no_score(answer):
    view = row_of(answer("divprune", 49))["steps"][-1]["views"][0]
    assert view.keys() == {"kept"}


def test_of_equal_scores_the_first_has_the_better_rank_and_none_has_none():
    assert ranks(np.array([1.0, np.nan, 3.0, 1.0, np.inf])).tolist() == [3, 0, 2, 4, 1]


def test_slots_that_are_pooled_from_everywhere_say_how_much_of_a_patch_they_read():
    weight = mx.array([[[0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0]]])
    result = synthetic([Reduction(weight_BKN=weight)], (2, 2))
    view = row_of(result)["steps"][0]["views"][0]
    assert view["kept"] is None and view["slot"] is None and view["size"] == [2, 3]
    assert view["read"] == [0.75, 1.0, 0.25, 0.0]


def synthetic(reductions: list[Reduction], grid: tuple[int, int], side: int = 64):
    """An answer whose steps are given, about a picture of noise."""
    N = grid[0] * grid[1]
    steps = [ReductionStep("norm" if n else "", n, [r]) for n, r in enumerate(reductions)]
    pixels = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    times = dict(image=1.0, vision=2.0, pruner=3.0, prefill=4.0, total=10.0)
    trace = Trace.of_images(steps, [N])
    return GenerationResult(
        "a", [1], 9, 1, 1.0, 1.0, 1.0, "length", N, N, [trace.kept(0)], "norm", "keep", times,
        trace.layers(8), trace=trace, views=[(Image.fromarray(pixels), grid)],
    )  # fmt: skip


def test_a_page_of_4096_tokens_and_a_photograph_is_below_five_megabytes():
    N, rng = 4096, np.random.default_rng(0)
    slot = rng.integers(0, N // 2, N)
    slot[: N // 2] = np.arange(N // 2)
    reduction = Reduction(
        mx.arange(N // 2)[None], slot_BN=mx.array(slot)[None],
        share_BN=mx.ones((1, N)), score_BN=mx.array(rng.random((1, N))),
    )  # fmt: skip
    result = synthetic([reduction] * 4, (64, 64), side=2000)
    assert len(result.explore(*[result] * 5).page()) < 5_000_000


def test_several_answers_lie_side_by_side_with_their_budgets(answer):
    exploration = answer("none").explore(answer("norm", 49), answer("fastv", 98))
    content = exploration.as_json()
    assert [row["budget"] for row in content["answers"]] == [None, {"tokens": 49}, {"tokens": 98}]
    assert content["budgets"] == [{"tokens": 49}, {"tokens": 98}] and content["format"] == 1
    assert content["methods"]["fastv"]["reads_prompt"] and content["depth"] == 4
    assert content["machine"]["cores"] and content["versions"]["mlx"]
    (view,) = content["views"]
    assert view["tokens"] == N and view["picture"].startswith("data:image/png;base64,")


def test_a_share_of_all_is_not_one_token_and_the_fewest_kept_come_first(answer):
    pairs = ((49, 49), (N, 1.0), (98, 0.5), (1, 1), (N, None))
    explored = [ExploredAnswer(answer("norm", kept), budget) for kept, budget in pairs]
    refused = [{"pruner": "fastv", "tokens": K, "why": "few"} for K in (0.02, 3)]
    everywhere = {"pruner": "duet", "why": "no"}
    content = json.loads(
        json.dumps(Exploration(explored, refused=[*refused, everywhere]).as_json())
    )
    assert content["budgets"] == [{"tokens": 1}, {"tokens": 49}, {"share": 0.5}, {"share": 1.0}]
    assert [row["budget"] for row in content["answers"]] == [
        {"tokens": 49}, {"share": 1.0}, {"share": 0.5}, {"tokens": 1}, None,
    ]  # fmt: skip
    assert [row.get("budget") for row in content["refused"]] == [
        {"share": 0.02}, {"tokens": 3}, None,
    ]  # fmt: skip
    assert not any("tokens" in row for row in content["refused"])


def test_answers_of_one_method_with_as_many_tokens_have_names_of_their_own(model, answer):
    again = generate(
        *model, PROMPT, IMAGE, pruner="norm", keep_tokens=49, positions="renumber", max_tokens=3
    )
    exploration = answer("none").explore(answer("norm", 49), again, answer("downsample", 49))
    rows = exploration.as_json()["answers"]
    assert [row["pruner"] for row in rows] == ["none", "norm", "norm (2)", "downsample"]
    assert [row["positions"] for row in rows[1:3]] == ["keep", "renumber"]


def test_answers_without_or_about_different_images_are_refused(model, answer):
    no_image = generate(*model, "is it red ?", max_tokens=1)
    with pytest.raises(UserError, match="there is nothing to explore: the prompt had no image"):
        no_image.explore()
    other = answer("norm", 49, compose(seed=1_000_000_008).image())  # of the same size
    with pytest.raises(UserError, match="not about the same images"):
        answer("norm", 49).explore(other)
    two = answer("norm", 49, [IMAGE, IMAGE])
    with pytest.raises(UserError, match="not about the same images"):
        answer("norm", 49).explore(two)
    views = two.explore().as_json()["views"]
    assert [(view["image"], view["first"]) for view in views] == [(0, 0), (1, 0)]


class Scripts(HTMLParser):
    """The script elements of a page, its title, and every address that it names."""

    def __init__(self, page: str):
        super().__init__()
        self.scripts: list[str] = []
        self.title, self.addresses, self.inside = "", list[str](), ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.inside = tag
        self.scripts += [""] if tag == "script" else []
        self.addresses += [v or "" for k, v in attributes if k in ("src", "href", "action")]
        assert not [k for k, _ in attributes if k.startswith("on")]

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside == "title":
            self.title += data

    def handle_endtag(self, tag):
        self.inside = ""


def test_hostile_text_stays_text_in_the_page(answer):
    for text in HOSTILE:
        explored = ExploredAnswer(answer("norm", 49), 49, text, [text])
        exploration = Exploration([explored], text, text, text, [{"pruner": text, "why": text}])
        page = Scripts(exploration.page())
        data, script = page.scripts
        content = json.loads(data)
        assert content["prompt"] == content["model"] == content["command"] == text
        assert content["refused"][0]["why"] == text and "pwned" not in script
        assert page.title.startswith("What was kept: ") and not page.addresses
        exploration.page().encode()  # a lone surrogate is written as its escape


def test_the_page_is_saved_whole_and_shown_in_a_notebook(answer, tmp_path):
    exploration = answer("norm", 49).explore()
    exploration.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text("utf-8") == exploration.page()
    frame = exploration._repr_html_()
    assert frame.startswith("<iframe ") and 'sandbox="allow-scripts"' in frame
    assert "<script" not in frame
    with pytest.raises(UserError, match="there is no folder"):
        exploration.save(tmp_path / "nowhere" / "page.html")
