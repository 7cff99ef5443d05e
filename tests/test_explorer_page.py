"""Promises of the page that `explore` writes, driven by a real browser.

Shapes: K of N = rows x columns visual tokens.
"""

from dataclasses import replace

import mlx.core as mx
import pytest
from PIL import Image

from benchmarks import gallery_page
from mlx_vlm_prune import explore, generate, load
from mlx_vlm_prune.generation.exploration import Exploration, ExploredAnswer
from mlx_vlm_prune.pruners.contract import Reduction

from .browser import Tab, start_browser
from .test_exploration import HOSTILE, synthetic
from .test_explore_command import content_of

RED, FADED = (200, 60, 60), (247, 226, 226)  # a kept patch, and a dropped one on white paper
N, ROWS, COLUMNS = 196, 14, 14
BUDGETS = (49, 98, 147)


@pytest.fixture(scope="module")
def browser():
    with start_browser() as running:
        yield running


@pytest.fixture(scope="module")
def file(browser, tmp_path_factory):
    """A page about a picture of one colour, by a method that drops and one inside the decoder."""
    folder = tmp_path_factory.mktemp("page")
    Image.new("RGB", (224, 224), RED).save(folder / "red.png")
    tokens = [str(K) for K in BUDGETS]
    explore.main([
        "--image", str(folder / "red.png"), "--prompt", "What does the sign say?", "--pruner",
        "divprune", "cls_attention+sparsevlm", "tome", "fastv", "--keep-tokens", *tokens,
        "--max-tokens", "4", "--no-predict", "--out", str(folder / "page.html"),
    ])  # fmt: skip
    return folder / "page.html"


@pytest.fixture
def tab(browser, file):
    tab = Tab(browser, file)
    yield tab
    tab.close()
    assert tab.faults == []


def slide(tab: Tab, place: int) -> None:
    """Set the slider over budgets, as a user's hand does."""
    tab.page.locator("#budget").fill(str(place))


def answer_of(content: dict, pruner: str, K: int) -> dict:
    wanted = (pruner, {"tokens": K})
    return next(a for a in content["answers"] if (a["pruner"], a["budget"]) == wanted)


def test_the_slider_changes_the_picture_to_exactly_the_kept_tokens(tab, file):
    content = content_of(file)
    for place, K in enumerate(BUDGETS):
        slide(tab, place)
        (kept,) = answer_of(content, "divprune", K)["kept_indices"]
        shown = [i for i, c in enumerate(tab.pixels(0, ROWS, COLUMNS)) if near(c, RED)]
        assert shown == kept and len(kept) == K
    slide(tab, len(BUDGETS))
    assert all(near(colour, RED) for colour in tab.pixels(0, ROWS, COLUMNS))


def near(colour, other) -> bool:
    return max(abs(a - b) for a, b in zip(colour, other, strict=True)) <= 6


def test_pointing_at_a_patch_shows_its_numbers(tab, file):
    content = content_of(file)
    slide(tab, 1)
    step = answer_of(content, "cls_attention+sparsevlm", 98)["steps"][-1]["views"][0]
    box = tab.page.locator("canvas").nth(1).bounding_box()
    for patch in (step["kept"][3], next(i for i in range(N) if step["slot"][i] < 0)):
        row, column = divmod(patch, COLUMNS)
        tab.page.mouse.move(
            box["x"] + (column + 0.5) * box["width"] / COLUMNS,
            box["y"] + (row + 0.5) * box["height"] / ROWS,
        )
        text = tab.page.locator("#readout-B").inner_text()
        assert text.startswith(f"Patch {patch}, row {row + 1}, column {column + 1}: ")
        if step["slot"][patch] < 0:
            assert "dropped" in text
        else:
            slot = step["slot"][patch]
            assert f"kept as slot {slot + 1} of {len(step['kept'])}" in text
            assert f"stands for {step['size'][slot]} patch" in text
            assert f"rank {step['rank'][patch]} of " in text


def test_the_keyboard_does_all_that_the_mouse_does(tab):
    canvas, readout = tab.page.locator("canvas").first, tab.page.locator("#readout-A")
    canvas.focus()
    patches = []
    for key in ("Home", "ArrowRight", "ArrowDown", "ArrowLeft", "End", "ArrowRight", "PageUp"):
        canvas.press(key)
        patches.append(int(canvas.get_attribute("aria-valuenow")))
        assert canvas.get_attribute("aria-valuetext") == readout.inner_text()
    assert patches == [0, 1, 15, 14, 195, 195, 55]
    budget = tab.page.locator("#budget")
    before = budget.input_value()
    budget.focus()
    budget.press("ArrowLeft")
    assert int(budget.input_value()) == int(before) - 1
    assert budget.get_attribute("aria-valuetext") == str(BUDGETS[int(before) - 1])
    reached = set()
    for _ in range(60):
        tab.page.keyboard.press("Tab")
        reached.add(tab.page.evaluate("document.activeElement.tagName"))
    assert {"CANVAS", "SELECT", "INPUT", "BUTTON", "SUMMARY"} <= reached


def test_steps_and_layers_are_walked_through(tab, file):
    content = content_of(file)
    slide(tab, 1)
    answer = answer_of(content, "cls_attention+sparsevlm", 98)
    pruning = [step for step in answer["steps"] if step["name"]]
    steps = tab.page.locator("#step-B")
    assert int(steps.get_attribute("max")) == len(pruning) - 1 == 2
    for place, step in enumerate(pruning):
        steps.fill(str(place))
        text, (view,) = tab.page.locator("#step-B-text").inner_text(), step["views"]
        assert text.startswith(step["name"].partition(",")[0])
        assert text.endswith(f": {step['tokens']} tokens (98 on average over all layers)")
        assert step["stage"] != "decoder" or f", layer{'s' * (place == 2)} {step['layer']}" in text
        slots = view.get("slot") or [0] * len(view["kept"])
        faded = [c for c in tab.pixels(1, ROWS, COLUMNS) if near(c, FADED)]
        assert len(faded) == N - sum(slot >= 0 for slot in slots)


def test_another_method_is_chosen_for_a_side(tab, file):
    content = content_of(file)
    tab.page.locator("select").filter(has_text="divprune").first.select_option("tome")
    slide(tab, 2)
    tab.wait_for_text("#answers h3", "tome, 147")
    assert (
        answer_of(content, "tome", 147)["text"]
        in tab.page.locator("#answers .answer").first.inner_text()
    )
    tab.page.locator("select").filter(has_text="divprune").nth(1).select_option(
        "cls_attention+sparsevlm"
    )
    tab.page.get_by_role("button", name="divprune").first.click()
    assert tab.page.locator("#panels select").first.input_value() == "divprune"


def test_a_refused_budget_is_explained_and_the_nearest_answer_shown(tab, file):
    content = content_of(file)
    refusal = next(row for row in content["refused"] if row["pruner"] == "fastv")
    assert refusal["budget"] == {"tokens": BUDGETS[0]}
    tab.page.locator("#panels select").first.select_option("fastv")
    slide(tab, 0)
    note = tab.page.locator("#panels .note").first
    assert note.inner_text() == f"No answer with 49: {refusal['why']}. Shown: 98."
    slide(tab, 1)
    assert note.is_hidden()
    assert f"was refused: {refusal['why']}" in tab.page.locator("#refused").inner_text()


def test_words_colour_the_picture(tab):
    slide(tab, 1)
    word = tab.page.locator("#words button").first
    before = tab.pixels(1, ROWS, COLUMNS)
    word.click()
    assert tab.page.locator("#words button").first.get_attribute("aria-pressed") == "true"
    assert tab.pixels(1, ROWS, COLUMNS) != before


@pytest.mark.parametrize(("width", "scheme", "clicks"), [(1280, "light", 2), (390, "dark", 1)])
def test_axe_finds_no_serious_fault_and_nothing_is_wider_than_the_screen(
    browser, file, width, scheme, clicks
):
    """In the system's colours, and in the other ones by the button."""
    tab = Tab(browser, file, width, scheme)
    assert tab.violations() == []
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    for _ in range(clicks):
        tab.page.locator("#theme").click()
    tab.page.locator("summary").first.click()
    theme = tab.page.locator("html").get_attribute("data-theme")
    assert {scheme, theme} == {"light", "dark"}
    assert tab.violations() == [] and tab.faults == []
    tab.close()


def test_the_gallery_is_read_on_a_phone(browser):
    tab = Tab(browser, gallery_page.PAGE, 390)
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = [tab.page.locator("#panels canvas").nth(side).bounding_box() for side in (0, 1)]
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[1]["y"] > boxes[0]["y"] + boxes[0]["height"]
    before = tab.page.locator("#readout-A").inner_text()
    tab.page.get_by_label("Method, side A").select_option("tome")
    slide(tab, 0)
    assert tab.page.locator("#readout-A").inner_text() != before and tab.faults == []
    tab.close()


def test_slots_that_are_pooled_from_everywhere_are_neither_dropped_nor_merged(browser, tmp_path):
    weight = mx.array([[[0.5, 0.5, 0, 0], [0.25, 0.5, 0.25, 0]]])
    pooled = synthetic([Reduction(weight_BKN=weight)], (2, 2))
    pooled.explore().save(tmp_path / "page.html")
    tab = Tab(browser, tmp_path / "page.html")
    text = tab.page.locator("#flows .verdict").inner_text()
    assert text.endswith("at the end 4 patches pooled into 2 slots.") and tab.faults == []
    tab.close()


def test_a_share_of_all_is_not_one_token_and_the_fewest_kept_come_first(browser, tmp_path):
    """Of images that differ a share and a number of tokens can be budgets side by side."""
    one = synthetic([Reduction(mx.array([[0, 3]]))], (2, 2))
    pairs = ((3, 3), (4, 1.0), (2, 0.5), (1, 1))  # what was kept, by which budget
    explored = [ExploredAnswer(replace(one, visual_tokens_kept=n), K) for n, K in pairs]
    refused = [{"pruner": "norm", "tokens": 0.25, "why": "too few"}]
    Exploration(explored, refused=refused).save(tmp_path / "page.html")
    tab = Tab(browser, tmp_path / "page.html")
    texts = ["1", "50 %", "3", "100 %"]
    assert tab.page.locator("#controls .ticks span").all_inner_texts() == texts
    label = tab.page.locator("label[for=budget]").inner_text()
    assert label.strip() == "Budget, tokens an image, or of an image:"
    for place, text in enumerate(texts):
        slide(tab, place)
        tab.wait_for_text("#answers h3", f"norm, {text}")
        assert tab.page.locator("#budget").get_attribute("aria-valuetext") == text
        assert tab.page.locator("#panels .note").first.is_hidden()
    assert tab.page.locator("#refused").inner_text() == "norm, 25 % was refused: too few"
    tab.page.get_by_role("button", name="norm").nth(0).click()  # the first that is listed
    assert tab.page.locator("#budget").input_value() == "2" and tab.faults == []
    tab.close()


def test_the_picture_shows_ranks_too(tab, file):
    slide(tab, 1)
    tab.page.locator("#controls select").select_option("score")
    tab.page.locator("#step-B").fill("0")
    answer = answer_of(content_of(file), "cls_attention+sparsevlm", 98)
    rank = next(s for s in answer["steps"] if s["name"])["views"][0]["rank"]
    colours = tab.pixels(1, ROWS, COLUMNS)
    best, worst = colours[rank.index(1)], colours[rank.index(N)]
    assert best[0] < 80 and worst[0] > 230  # the accent, and paper


def test_answers_alone_make_pages_too_and_each_picture_can_be_chosen(browser, tmp_path):
    pictures = [Image.new("RGB", (224, 224), RED), Image.new("RGB", (224, 224), (60, 60, 200))]
    model, processor = load()
    budgets = {"none": N, "norm": 49}
    full, pruned = (
        generate(
            model, processor, "is it red ?", pictures, pruner=name, keep_tokens=K, max_tokens=1
        )
        for name, K in budgets.items()
    )
    for number, exploration in enumerate((full.explore(), pruned.explore(), full.explore(pruned))):
        exploration.save(tmp_path / f"{number}.html")
        tab = Tab(browser, tmp_path / f"{number}.html")
        assert tab.page.locator("canvas").count() == 1 and tab.violations() == []
        assert tab.page.locator("#budget").count() == (number == 2)
        choice = tab.page.get_by_label("Picture", exact=True)
        choice.select_option("1")
        kept = [i for i, c in enumerate(tab.pixels(0, ROWS, COLUMNS)) if near(c, (60, 60, 200))]
        assert kept == (full.kept_indices if number == 0 else pruned.kept_indices)[1]
        assert tab.faults == []
        tab.close()


def test_a_notebook_shows_the_page_in_a_frame(browser, file, tmp_path):
    image = Image.new("RGB", (224, 224), RED)
    answer = generate(*load(), "is it red ?", image, pruner="norm", keep_tokens=49, max_tokens=1)
    notebook = (
        f"<!DOCTYPE html><html data-ready><body>{answer.explore()._repr_html_()}</body></html>"
    )
    (tmp_path / "notebook.html").write_text(notebook, encoding="utf-8")
    tab = Tab(browser, tmp_path / "notebook.html")
    frame = tab.page.frame_locator("iframe")
    frame.locator("html[data-ready]").wait_for()
    assert frame.locator("canvas").count() == 1 and tab.faults == []
    tab.close()


def test_nothing_that_a_stranger_wrote_is_executed(browser, tmp_path):
    answers = [
        generate(*load(), "is it red ?", Image.new("RGB", (224, 224), RED), pruner=pruner,
                 keep_tokens=K, max_tokens=1)
        for pruner, K in (("none", N), ("norm", 49))
    ]  # fmt: skip
    text = "\n".join(HOSTILE)
    odds = {"full_answer": {"full": [-1.0] * len(HOSTILE), "pruned": [-2.0] * len(HOSTILE)}}
    explored = [
        ExploredAnswer(replace(answer, text=text), K, text, [*HOSTILE], None, odds)
        for answer, K in zip(answers, (None, 49), strict=True)
    ]
    refused = [{"pruner": each, "why": each} for each in HOSTILE]
    Exploration(explored, text, text, text, refused).save(tmp_path / "page.html")
    tab = Tab(browser, tmp_path / "page.html")
    assert tab.page.evaluate("window.pwned") is None and tab.faults == []
    assert tab.page.locator("h1").evaluate("e => e.textContent") == text
    assert tab.page.locator("img, iframe, object").count() == 0
    assert tab.page.locator("script").count() == 2
    tab.close()
