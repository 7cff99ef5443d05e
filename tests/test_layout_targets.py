"""Promises of what patches must name of a page: lines and words, bars, the digits of numbers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mlx_vlm_prune.scenes import compose, pages
from mlx_vlm_prune.scenes.pages import Facts, Page, Text
from mlx_vlm_prune.scenes.pages.page import Shape
from torch_ref.training.layout_targets import DIGITS, LAYOUT_GROUPS, NO_DIGIT, bars, text_targets
from torch_ref.training.scenes_data import ScenesBatches
from torch_ref.training.scenes_model import SIZES, Trainee
from torch_ref.training.worlds import IGNORE, PAGES, PageWorld, SceneWorld

BAR = list(LAYOUT_GROUPS).index("bar")
SIDES = slice(0, 7), slice(7, 14)  # left and right half of a line of patches
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def page(layout: str, *texts: Text, **facts) -> Page:
    blank = Page(0, layout, "DejaVuSansMono", WHITE, BLACK, 0.0, 0.0, texts, (), Facts(), side=224)
    return replace(blank, facts=Facts(**facts))


def placed(page: Page) -> dict[str, tuple[int, int]]:
    """Line and place in the line of each text."""
    targets = zip(page.texts, text_targets(page), strict=True)
    return {text.text: (target["line"], target["word"]) for text, target in targets}


def number(target: dict[str, int]) -> str:
    """What the digits of a number say, or nothing."""
    digits = [target[name] for name in DIGITS if name in target]
    return "".join(str(digit) for digit in digits if digit != NO_DIGIT)


def test_a_number_of_a_table_has_the_line_of_its_row_and_the_place_of_its_column():
    drawn = page(
        "table",
        Text("Jan", 100, 40, 12, "rm"),
        Text("Feb", 160, 40, 12, "rm"),
        Text("Pear", 20, 60, 12),
        Text("31", 100, 60, 12, "rm"),
        Text("7", 160, 60, 12, "rm"),
        Text("Milk", 20, 80, 12),
        Text("52", 100, 80, 12, "rm"),
        Text("8", 160, 80, 12, "rm"),
    )
    assert placed(drawn) == {
        "Jan": (0, 1), "Feb": (0, 2),
        "Pear": (1, 0), "31": (1, 1), "7": (1, 2),
        "Milk": (2, 0), "52": (2, 1), "8": (2, 2),
    }  # fmt: skip


def test_every_line_of_a_receipt_tells_how_many_items_there_are():
    texts = (
        Text("Shop", 80, 20, 12, "mm"),
        Text("Pear", 20, 40, 12),
        Text("31", 160, 40, 12, "rm"),
        Text("Total", 20, 60, 12),
        Text("107", 160, 60, 12, "rm"),
    )
    drawn = page("receipt", *texts, total=107, lines={"items are on the receipt": 1})
    assert placed(drawn) == {
        "Shop": (0, 0), "Pear": (1, 0), "31": (1, 1), "Total": (2, 0), "107": (2, 1),
    }  # fmt: skip
    targets = text_targets(drawn)
    assert {target["lines"] for target in targets} == {1}
    assert [number(target) for target in targets] == ["", "", "31", "", "107"]
    assert targets[2]["third digit"] == NO_DIGIT and "first digit" not in targets[0]


def test_each_column_of_running_text_has_lines_of_its_own():
    drawn = page(
        "columns",
        Text("pear", 14, 20, 12),
        Text("milk", 60, 20, 12),
        Text("egg", 14, 40, 12),
        Text("owl", 120, 20, 12),
        lines={"lines are in the left column": 2, "lines are in the right column": 1},
    )
    assert placed(drawn) == {"pear": (0, 0), "milk": (0, 1), "egg": (1, 0), "owl": (0, 0)}
    assert [target["lines"] for target in text_targets(drawn)] == [2, 2, 2, 1]


def test_bars_and_their_names_tell_which_is_highest_and_where_their_tops_are():
    heights = {"pear": 40.0, "egg": 80.0, "owl": 120.0}  # in pixels here
    texts = [Text(name.title(), 40 + 48 * i, 200, 12, "mm") for i, name in enumerate(heights)]
    corners = [
        (26.0 + 48 * i, 180.0 - height, 54.0 + 48 * i, 180.0)
        for i, height in enumerate(heights.values())
    ]
    shapes = [
        Shape(((x0, y1), (x0, y0), (x1, y0), (x1, y1)), is_polygon=True)
        for x0, y0, x1, y1 in corners
    ]
    drawn = replace(page("bars", *texts, heights=heights, chart="bar"), shapes=tuple(shapes))
    assert text_targets(drawn) == [  # tops at 140, 100 and 60 pixels
        {"bar": 2, "top": 17}, {"bar": 0, "top": 12}, {"bar": 1, "top": 7},
    ]  # fmt: skip
    targets = PageWorld(pages.SMALL).layout_targets(drawn).reshape(14, 14, -1)[:, :, BAR]
    # The bars cover the middles of patches 2, 5 and 8 of a line; lines 4 and 9 lie at 72 and 152.
    lines = [columns(row) for row in targets[[3, 4, 9, 10, 11]]]
    assert lines == [{}, {8: 1}, {2: 2, 5: 0, 8: 1}, {2: 2, 5: 0, 8: 1}, {}]


def columns(row: np.ndarray) -> dict[int, int]:
    return {i: int(n) for i, n in enumerate(row) if n != IGNORE}


@pytest.mark.parametrize("size", [pages.SMALL, pages.LARGE])
def test_every_target_of_composed_pages_is_within_its_group(size):
    seen: dict[str, set[int]] = {name: set() for name in LAYOUT_GROUPS}
    for seed in range(100):
        targets = PageWorld(size).layout_targets(pages.compose(seed, size))
        for name, column in zip(LAYOUT_GROUPS, targets.T, strict=True):
            seen[name] |= set(column.tolist()) - {IGNORE}
    for name, classes in LAYOUT_GROUPS.items():
        assert seen[name] and seen[name] <= set(range(classes)), name
    assert seen["bar"] == {0, 1, 2} and seen["first digit"] == set(range(1, 10))


@pytest.mark.parametrize("layout", ["bars", "curve"])
def test_bars_and_points_of_turned_charts_are_named_where_they_are_painted(layout):
    """By the picture itself: the one patch that holds the top of a bar, or a point."""
    size, right, total = pages.SMALL, 0, 0
    for seed in range(300):
        drawn = pages.compose(seed, size)
        if drawn.layout != layout or abs(drawn.turn) < 1:
            continue
        targets = PageWorld(size).layout_targets(drawn).reshape(14, 14, -1)
        ranked = sorted(drawn.facts.heights, key=drawn.facts.heights.__getitem__)
        for name, (polygon, _) in bars(drawn).items():
            x, y = np.mean(polygon.points, axis=0)
            x, y = drawn.turned(x, y)
            rank = {ranked[0]: 2, ranked[-1]: 1}.get(name, 0)
            top = drawn.turned(x, min(y for _, y in polygon.points))[1]
            patch = targets[int(y) // 16, int(x) // 16]
            total += 1
            right += patch[BAR] == rank and abs(8 * patch[BAR + 1] + 4 - top) < 8
    assert total > 40 and right >= 0.97 * total  # neighbouring points may share a patch


@pytest.mark.parametrize("size", [pages.SMALL, pages.LARGE])
def test_answers_about_pages_can_be_read_from_words_and_these_targets(size):
    """Every fact of 200 pages, without the places of its texts."""
    for seed in range(200):
        drawn = pages.compose(seed, size)
        facts, targets = drawn.facts, text_targets(drawn)
        words = [text.text.lower() for text in drawn.texts]
        if facts.heights:
            ranks = {word: target["bar"] for word, target in zip(words, targets, strict=True)}
            low, *_, high = sorted(facts.heights, key=facts.heights.__getitem__)
            assert ranks == {**dict.fromkeys(facts.heights, 0), high: 1, low: 2}
            continue
        assert [number(t) for t in targets] == [word if word.isdigit() else "" for word in words]
        if drawn.layout == "columns":
            for side, count in zip((-1, 1), facts.lines.values(), strict=True):
                mine = [
                    target
                    for text, target in zip(drawn.texts, targets, strict=True)
                    if side * (text.x - size.side / 2) > 0
                ]
                assert {t["lines"] for t in mine} == {count} == {max(t["line"] for t in mine) + 1}
            continue
        assert {t["lines"] for t in targets if "lines" in t} == set(facts.lines.values())
        places = [(target["line"], target["word"]) for target in targets]
        at, of = dict(zip(places, words, strict=True)), dict(zip(words, places, strict=True))
        for (row, column), value in facts.cells.items():
            assert at[of[row][0], of[column][1]] == str(value)
        totals = {} if facts.total is None else {"total": str(facts.total)}
        for label, filled in (facts.fields | totals).items():
            assert at[of[label][0], 1] == filled


def test_patches_on_a_text_and_no_others_have_targets():
    drawn = page("form", Text("city", 16, 40, 12), Text("lima", 108, 40, 12))
    targets = PageWorld(pages.SMALL).layout_targets(drawn).reshape(14, 14, -1)
    word = list(LAYOUT_GROUPS).index("word")
    # 4 letters of 7.22 pixels: from 16 to 45 and from 108 to 137. A patch whose middle lies less
    # than 8 pixels beside them has targets: that at 104, not those at 8, 56, 88 and 152.
    assert columns(targets[2, :, word]) == {1: 0, 2: 0, 6: 1, 7: 1, 8: 1}
    assert (np.delete(targets, 2, axis=0) == IGNORE).all()
    assert (targets[:, :, BAR] == IGNORE).all()
    assert (SceneWorld().layout_targets(compose(0)) == IGNORE).all()


def test_a_text_of_a_turned_page_is_named_where_it_is_painted():
    texts = (Text("city", 14, 112, 12), Text("lima", 180, 112, 12))
    drawn = replace(page("form", *texts), turn=2.0)
    targets = PageWorld(pages.SMALL).layout_targets(drawn).reshape(14, 14, -1)
    dark = np.asarray(pages.draw(drawn).convert("L")) < 128
    ink = dark.reshape(14, 16, 14, 16).sum((1, 3))
    word = targets[:, :, list(LAYOUT_GROUPS).index("word")]
    lines = [np.flatnonzero((word[:, half] != IGNORE).any(axis=1)).tolist() for half in SIDES]
    assert lines == [[ink[:, half].sum(axis=1).argmax()] for half in SIDES] == [[7], [6]]


def test_the_targets_teach_a_tower_that_learns_and_no_other():
    trainee, batch = Trainee(0.5, SIZES["pages"]), next(iter(ScenesBatches(4, 40, 0, PAGES)))
    batch = batch.to(torch.device("cpu"))
    loss, figures = trainee(batch, questions=False)
    assert figures.keys() >= LAYOUT_GROUPS.keys()
    without = replace(batch, layout=torch.full_like(batch.layout, IGNORE))
    other, figures = trainee(without, questions=False)
    assert all(figures[name] == 0 for name in LAYOUT_GROUPS) and other < loss
    x_BND = trainee.vlm.tower(batch.pixels).signals.x_BND
    trainee.layout_loss(x_BND, batch.layout)[0].backward()
    grad = trainee.vlm.tower.embeddings.patch_embedding.weight.grad
    assert grad is not None and grad.any()
    trainee.vlm.tower.requires_grad_(False)
    assert not trainee(batch, questions=False)[1].keys() & LAYOUT_GROUPS.keys()
    assert Trainee(0.5, SIZES["deep"]).layout is None


def test_of_three_ranks_as_likely_the_loss_is_that_of_a_guess():
    trainee = Trainee(0.5, SIZES["pages"])
    assert trainee.layout
    trainee.layout.bias.data.zero_()
    x_BND, targets = torch.zeros(1, 5, 192), torch.full((1, 5, len(LAYOUT_GROUPS)), IGNORE)
    targets[0, 0, BAR] = 1  # of one patch
    loss, figures = trainee.layout_loss(x_BND, targets)
    np.testing.assert_allclose(loss.item(), np.log(3) / 2, rtol=1e-6)
    trainee.layout.bias.data[1] = 1.0
    assert trainee.layout_loss(x_BND, targets)[1]["bar"] == 1 and figures["line"] == 0
