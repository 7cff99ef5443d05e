"""Promises of the printed pages and the large scenes: every answer can be read off the picture."""

import math
from collections import Counter

import numpy as np
import pytest
from PIL import ImageFont

from mlx_vlm_prune.evaluation.questions import format_of
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, LARGE, SMALL, compose, pages, question_set
from mlx_vlm_prune.scenes.pages.draw import OVERSAMPLE, load_font
from mlx_vlm_prune.scenes.pages.page import Facts, Page, Shape, Text, width_of
from mlx_vlm_prune.scenes.pages.words import LEXICON, PRINTED
from mlx_vlm_prune.scenes.vocabulary import UNKNOWN, large_words, tokenizer, words

SEEDS = HELD_OUT_SEEDS[:150]


BOTH_SIZES = pytest.mark.parametrize("page_size", [pages.SMALL, pages.LARGE], ids=["224", "384"])


@pytest.fixture(scope="module", params=[pages.SMALL, pages.LARGE], ids=["224", "384"])
def held_out(request):
    return list(pages.page_questions(HELD_OUT_SEEDS, 30, request.param))


def test_a_seed_draws_the_same_page_every_time_and_another_seed_another():
    first, again, other = (np.asarray(pages.draw(pages.compose(seed))) for seed in (5, 5, 6))
    assert first.shape == (384, 384, 3)
    assert pages.draw(pages.compose(5, pages.SMALL)).size == (224, 224)
    assert (first == again).all() and (first != other).any()


@BOTH_SIZES
def test_all_layouts_and_fonts_occur_and_every_font_has_every_letter(page_size):
    drawn = [pages.compose(seed, page_size) for seed in SEEDS]
    assert {page.layout for page in drawn} == set(pages.LAYOUTS)
    assert {page.font for page in drawn} == set(pages.FONTS)
    for name in pages.FONTS:
        font = load_font(name, 30)
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
        shapes = {letter: font.getmask(letter).getbbox() for letter in letters}
        assert all(shapes.values()), name
        assert (
            font.getlength("m") > 0 and font.getmask("o").getbbox() != font.getmask("m").getbbox()
        )


@BOTH_SIZES
def test_texts_are_within_the_page_apart_and_no_wider_than_their_boxes(page_size):
    for seed in SEEDS:
        page = pages.compose(seed, page_size)
        boxes = []
        for text in page.texts:
            left, top, right, bottom = text.box
            assert left >= 0 and right <= page.side and top >= 0 and bottom <= page.side, page
            font = load_font(page.font, round(OVERSAMPLE * text.size))
            assert isinstance(font, ImageFont.FreeTypeFont)
            assert font.getlength(text.text) / OVERSAMPLE <= right - left + 1, (page.font, text)
            assert text.size >= page_size.smallest
            boxes.append((left, top, right, bottom))
        for i, (left, top, right, bottom) in enumerate(boxes):
            for x0, y0, x1, y1 in boxes[i + 1 :]:
                assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top, (page, i)


def printed_rows(page: Page) -> list[list[Text]]:
    """The texts by their height on the page, each row from left to right."""
    rows: dict[float, list[Text]] = {}
    for text in page.texts:
        rows.setdefault(round(text.y, 3), []).append(text)
    return [sorted(row, key=lambda text: text.x) for _, row in sorted(rows.items())]


def truth(page: Page, kind: str, text: str) -> str:
    """The answer, read off the texts and shapes, not off the facts."""
    question_words = text.lower().rstrip("?").split()
    rows = printed_rows(page)
    plain = [[t.text.lower() for t in row] for row in rows]
    if kind == "total":
        *items, last = plain[1:]
        assert last[0] == "total" and last[1] == str(sum(int(row[1]) for row in items))
        return last[1]
    if kind == "cell":
        head = next(t for t in rows[0] if t.text.lower() == question_words[-1])
        row = next(row for row in rows if row[0].text.lower() == question_words[4])
        return next(t.text for t in row if t.x == head.x)
    if kind == "field":
        return next(row[1] for row in plain if row[0] == question_words[-1])
    if kind == "highest":
        label_at = {t.x: t.text.lower() for t in page.texts}
        tops = {}
        for shape in (shape for shape in page.shapes if shape.is_polygon):
            middle = (shape.points[0][0] + shape.points[2][0]) / 2
            near = min(label_at, key=lambda x: abs(x - middle))
            tops[label_at[near]] = min(y for _, y in shape.points)
        return (min if "highest" in question_words else max)(tops, key=tops.__getitem__)
    if kind == "lines" and page.layout == "receipt":
        return str(sum(row[1].isdigit() for row in plain[1:-1]))
    if kind == "lines":
        is_left = "left" in question_words
        sides = [row for row in rows if any((t.x < page.side / 2 - 5) == is_left for t in row)]
        return str(len(sides))
    if kind == "word":
        return "yes" if question_words[-1] in [word for row in plain for word in row] else "no"
    matches = [t for t in page.texts if t.text.lower() == question_words[-1]]
    assert kind == "place" and len(matches) == 1
    left, _, right, _ = matches[0].box
    x, y = page.turned((left + right) / 2, matches[0].y)
    return "abcd"[int(4 * x / page.side)] + "1234"[int(4 * y / page.side)]


def test_every_question_has_the_answer_that_the_page_shows(held_out):
    kinds = Counter()
    for page, questions in held_out:
        assert page.seed in HELD_OUT_SEEDS
        for question in questions:
            assert question.answer == truth(page, question.kind, question.text), (page, question)
            kinds[question.kind] += 1
    assert kinds == dict.fromkeys(pages.KINDS, 30)


def answers_beside(page: Page) -> dict[str, str]:
    """The answers to the questions of training about what is beside a word."""
    questions = (pages.ask(page, "beside", np.random.default_rng(n)) for n in range(120))
    return {question.text: question.answer for question in questions if question}


def test_what_is_beside_a_word_is_what_the_facts_of_the_page_say(held_out):
    checked = Counter()
    for page, _ in held_out[:150]:
        answers, facts = answers_beside(page), page.facts
        beside = {**facts.fields, **({"total": str(facts.total)} if facts.total else {})}
        for label, value in beside.items():
            if (text := f"What is right of {label}?") in answers:
                assert answers[text] == value, (page.seed, label)
                checked[page.layout] += 1
        printed = {text.text.lower() for text in page.texts} | {"nothing"}
        assert set(answers.values()) <= printed, page.seed
        if page.layout == "receipt":
            *names, last = [t.text.lower() for t in page.texts if t.anchor == "lm"]
            for above, below in zip(names, [*names[1:], last], strict=True):
                if (text := f"What is below {above}?") in answers:
                    assert answers[text] == below, (page.seed, above)
                    checked["names"] += 1
    assert min(checked.values()) > 9 and len(checked) == 3, checked


def test_no_answer_is_right_for_most_questions_of_a_kind(held_out):
    answers = {kind: Counter() for kind in pages.KINDS}
    for _, questions in held_out:
        for question in questions:
            answers[question.kind][question.answer] += 1
    shares = {kind: max(count.values()) / 30 for kind, count in answers.items()}
    assert shares["word"] <= 0.7
    assert all(share <= 0.4 for kind, share in shares.items() if kind != "word"), shares


def test_a_turned_point_is_where_the_picture_has_it():
    ink = (0, 0, 0)
    dot = Shape(((98, 58), (102, 58), (102, 62), (98, 62)), is_polygon=True)
    page = Page(0, "form", "Roboto-Bold", (255, 255, 255), ink, 2.0, 0.0, (), (dot,), Facts())
    dark = 255 - np.asarray(pages.draw(page)).mean(axis=2)
    y, x = (np.indices(dark.shape) * dark).sum(axis=(1, 2)) / dark.sum()
    assert np.allclose((x + 0.5, y + 0.5), page.turned(100, 60), atol=0.5)
    assert math.dist(page.turned(100, 60), (100, 60)) > 3


def test_questions_and_answers_are_made_of_known_words_and_numbers_of_digits(held_out):
    tokens = large_words()
    assert tokens[: len(words())] == words() and len(set(tokens)) == len(tokens)
    speaks, unknown = tokenizer(tokens), tokens.index(UNKNOWN)
    for _, questions in held_out:
        for question in questions:
            ids = speaks.encode(question.text, add_special_tokens=False).ids
            answer = speaks.encode(question.answer, add_special_tokens=False).ids
            assert unknown not in ids + answer, question
            assert speaks.decode(answer) == question.answer
            if question.answer.isdigit():
                assert len(answer) == len(question.answer)
    assert len(set(PRINTED)) == len(PRINTED)
    assert width_of(max(LEXICON, key=len), 14) < 100


def test_large_scenes_hold_up_to_twelve_things_small_ones_too_each_in_its_cell():
    scenes = [compose(seed, LARGE) for seed in SEEDS]
    assert max(len(scene.things) for scene in scenes) == 12
    radii = [thing.radius for scene in scenes for thing in scene.things]
    assert min(radii) < 10 and max(radii) > 39
    for scene in scenes:
        cells = [t.cell for t in scene.things] + list(scene.sign.cells if scene.sign else ())
        assert len(set(cells)) == len(cells)
        for thing in scene.things:
            column, row = "abcd".index(thing.cell[0]), "1234".index(thing.cell[1])
            for middle, place in ((thing.x, column), (thing.y, row)):
                assert place * 96 <= middle - thing.radius
                assert middle + thing.radius <= (place + 1) * 96
    assert scenes[0].image().size == (384, 384)
    assert compose(3, SMALL) == compose(3) and compose(3).image().size == (224, 224)


def test_large_scenes_and_pages_are_question_sets_like_any_other():
    for name, kinds, side in (("scenes-large", 6, 384), ("pages", 7, 224), ("pages-large", 7, 384)):
        questions = list(format_of(name).module.read_drawn(2))
        assert len(questions) == 2 * kinds
        picture = questions[0].image
        assert callable(picture) and picture().size == (side, side)
        assert format_of(name).module.score(questions[0], f" {questions[0].answers[0].upper()}.")
    small = [q.text for _, questions in question_set(HELD_OUT_SEEDS, 2) for q in questions]
    large = [q.text for _, questions in question_set(HELD_OUT_SEEDS, 2, LARGE) for q in questions]
    assert small != large
