"""Promises of what patches must name of a page's order: rows and columns, lines, bars."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mlx_vlm_prune.scenes import compose, pages
from mlx_vlm_prune.scenes.pages import Facts, Page, Text
from mlx_vlm_prune.scenes.pages.page import Shape
from mlx_vlm_prune.scenes.pages.words import PRINTED
from torch_ref.training.bindings import BINDINGS, LINES, NAMES, PLACES, bindings
from torch_ref.training.scenes_data import ScenesBatches
from torch_ref.training.scenes_model import SIZES, Trainee, binding_loss
from torch_ref.training.worlds import IGNORE, PAGES, PageWorld, SceneWorld

BAR = list(BINDINGS).index("bar")
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def page(layout: str, *texts: Text, **facts) -> Page:
    blank = Page(0, layout, "DejaVuSansMono", WHITE, BLACK, 0.0, 0.0, texts, (), Facts(), side=224)
    return replace(blank, facts=Facts(**facts))


def by_text(page: Page) -> dict[str, dict[str, str | int]]:
    """What each text belongs to, words in place of their numbers."""
    return {
        text.text: {
            name: PRINTED[place] if name in ("row", "column") else place
            for name, place in belongs.items()
        }
        for text, belongs in zip(page.texts, bindings(page), strict=True)
    }


def test_a_number_of_a_table_belongs_to_the_names_of_its_row_and_column():
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
    assert by_text(drawn) == {
        "Jan": {"line": 0},
        "Feb": {"line": 0},
        "Pear": {"line": 1},
        "31": {"line": 1, "row": "pear", "column": "jan"},
        "7": {"line": 1, "row": "pear", "column": "feb"},
        "Milk": {"line": 2},
        "52": {"line": 2, "row": "milk", "column": "jan"},
        "8": {"line": 2, "row": "milk", "column": "feb"},
    }


def test_a_price_belongs_to_its_item_and_every_line_tells_how_many_items_there_are():
    texts = (
        Text("Shop", 80, 20, 12, "mm"),
        Text("Pear", 20, 40, 12),
        Text("31", 160, 40, 12, "rm"),
        Text("Total", 20, 60, 12),
        Text("31", 160, 60, 12, "rm"),
    )
    drawn = page("receipt", *texts, total=31, lines={"items are on the receipt": 1})
    pear, total = PRINTED.index("pear"), PRINTED.index("total")
    assert bindings(drawn) == [
        {"line": 0, "lines": 1},
        {"line": 1, "lines": 1},
        {"line": 1, "lines": 1, "row": pear},
        {"line": 2, "lines": 1},
        {"line": 2, "lines": 1, "row": total},
    ]


def test_each_column_of_running_text_has_lines_of_its_own():
    drawn = page(
        "columns",
        Text("pear", 14, 20, 12),
        Text("milk", 60, 20, 12),
        Text("egg", 14, 40, 12),
        Text("owl", 120, 20, 12),
        lines={"lines are in the left column": 2, "lines are in the right column": 1},
    )
    assert by_text(drawn) == {
        "pear": {"line": 0, "lines": 2},
        "milk": {"line": 0, "lines": 2},
        "egg": {"line": 1, "lines": 2},
        "owl": {"line": 0, "lines": 1},
    }


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
    assert by_text(drawn) == {  # tops at 140, 100 and 60 pixels
        "Pear": {"bar": 2, "top": 17},
        "Egg": {"bar": 0, "top": 12},
        "Owl": {"bar": 1, "top": 7},
    }
    targets = PageWorld(pages.SMALL).bindings(drawn).reshape(14, 14, -1)[:, :, BAR]
    # The bars cover the middles of patches 2, 5 and 8 of a line; lines 4 and 9 lie at 72 and 152.
    lines = [columns(row) for row in targets[[3, 4, 9, 10, 11]]]
    assert lines == [{}, {8: 1}, {2: 2, 5: 0, 8: 1}, {2: 2, 5: 0, 8: 1}, {}]


def columns(row: np.ndarray) -> dict[int, int]:
    return {i: int(n) for i, n in enumerate(row) if n != IGNORE}


@pytest.mark.parametrize("size", [pages.SMALL, pages.LARGE])
def test_answers_about_pages_can_be_read_from_what_texts_belong_to(size):
    """Every fact of 200 pages, from their texts and bindings alone."""
    for seed in range(200):
        drawn = pages.compose(seed, size)
        facts, belongs = drawn.facts, bindings(drawn)
        named = [(t.text.lower(), b) for t, b in zip(drawn.texts, belongs, strict=True)]
        by_names = {
            tuple(PRINTED[b[name]] for name in ("row", "column") if name in b): word
            for word, b in named
        }
        assert all(by_names[names] == str(number) for names, number in facts.cells.items())
        assert all(by_names[label,] == value for label, value in facts.fields.items())
        assert facts.total is None or by_names["total",] == str(facts.total)
        if facts.heights:
            ranks = {b["bar"]: word for word, b in named}
            assert ranks[1] == max(facts.heights, key=facts.heights.__getitem__)
            assert ranks[2] == min(facts.heights, key=facts.heights.__getitem__)
        assert {b["lines"] for _, b in named if "lines" in b} == set(facts.lines.values())
        assert all(b.get("line", 0) < LINES and b.get("lines", 0) < LINES for b in belongs)


def test_patches_on_a_text_and_no_others_name_what_it_belongs_to():
    drawn = page("form", Text("city", 16, 40, 12), Text("lima", 112, 40, 12))
    targets = PageWorld(pages.SMALL).bindings(drawn).reshape(14, 14, -1)
    city = [PRINTED.index("city"), IGNORE, IGNORE, IGNORE, 0, IGNORE]
    # "lima" is drawn from 112 to 141, 4 letters of 7.22 pixels: patches 7 and 8 of line 2.
    on = {column for column in range(14) if targets[2, column].tolist() == city}
    assert on == {7, 8}
    assert (targets[:, :, 0] != IGNORE).sum() == 2
    assert (targets[[0, 1, 3]] == IGNORE).all()
    assert (SceneWorld().bindings(compose(0)) == IGNORE).all()


def test_of_three_equal_scores_the_loss_is_that_of_a_guess():
    head, targets = nn.Linear(4, sum(PLACES.values())), torch.full((1, 5, len(BINDINGS)), IGNORE)
    head.bias.data.zero_()
    targets[0, 0, BAR] = 1  # of one patch; with no features each of three ranks is as likely
    loss, figures = binding_loss(head, torch.zeros(1, 5, 4), targets, PLACES)
    np.testing.assert_allclose(loss.item(), np.log(3) / 2, rtol=1e-6)
    assert figures.keys() == PLACES.keys() and figures["line"] == 0
    head.bias.data[1] = 1.0
    assert binding_loss(head, torch.zeros(1, 5, 4), targets, PLACES)[1]["bar"] == 1


def test_what_texts_belong_to_teaches_a_tower_that_learns_and_its_reader():
    trainee, batch = Trainee(0.5, SIZES["pages"]), next(iter(ScenesBatches(4, 40, 0, PAGES)))
    batch = batch.to(torch.device("cpu"))
    loss, figures = trainee(batch, questions=True)
    assert figures.keys() >= BINDINGS.keys()
    assert not figures.keys() - trainee(batch, questions=False)[1].keys() - {"answer", *NAMES}
    without = replace(batch, bindings=torch.full_like(batch.bindings, IGNORE))
    other, figures = trainee(without, questions=True)
    assert all(figures[name] == 0 for name in BINDINGS) and other < loss
    trainee.vlm.tower.requires_grad_(False)
    assert not trainee(batch, questions=True)[1].keys() & BINDINGS.keys()
    assert Trainee(0.5, SIZES["deep"]).names is None


def test_names_are_read_in_the_middle_of_the_language_model():
    """The layers up to there learn from names alone, those behind do not."""
    trainee, batch = Trainee(0.5, SIZES["pages"]), next(iter(ScenesBatches(4, 40, 0, PAGES)))
    batch = batch.to(torch.device("cpu"))
    x_BND = trainee.vlm.projector(trainee.vlm.tower(batch.pixels).signals.x_BND)
    trainee.answers(x_BND, batch)
    x_BND = trainee.middle_BLD[:, batch.first_visual :][:, :196]
    assert trainee.names
    binding_loss(trainee.names, x_BND, batch.bindings, NAMES)[0].backward()
    learned = [layer.mlp.down_proj.weight.grad is not None for layer in trainee.vlm.language.layers]
    assert learned == [True, True, False, False]
