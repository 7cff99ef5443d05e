"""`auto` keeps more for counting, places and reading, by the prompt's words, and for documents."""

import pytest
from PIL import Image

from mlx_vlm_prune.pruners.auto import ModelFacts, choose
from mlx_vlm_prune.pruners.auto.caution import cautious, subject_of
from mlx_vlm_prune.pruners.auto.document import is_document, patches
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, compose, question_set
from mlx_vlm_prune.scenes import pages as pages_world
from mlx_vlm_prune.scenes.pages import draw

PROMPTS = {
    "How many stars are there?": "counting", "Count the people.": "counting",
    "图中有几个苹果": "counting",
    "Where is the red square?": "places", "Give the bounding box of the car": "places",
    "What does the sign say?": "reading", "Read the label": "reading", "上面写着什么": "reading",
    "Describe this image.": None, "What colour is the star?": None, "Is it already there?": None,
    "Somewhere over the rainbow": None, "Say hello to the county": None,
}  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_worth_caution_by_its_words(prompt):
    subject = subject_of(prompt)
    assert (subject and subject[0].subject) == PROMPTS[prompt]


def test_the_built_in_questions_of_these_kinds_are_seen_and_the_others_are_not():
    subjects = {"counting": "counting", "grounding": "places", "reading": "reading"}
    for _, questions in zip(range(20), (q for _, q in question_set(HELD_OUT_SEEDS, 18)),
                            strict=False):  # fmt: skip
        for question in questions:
            subject = subject_of(question.text)
            assert (subject and subject[0].subject) == subjects.get(question.kind), question.text


def test_caution_keeps_twice_as_much_up_to_half():
    cases = [
        (0.25, None, 100, (0.5, None)), (0.1, None, None, (0.2, None)),
        (0.3, None, 100, (0.5, None)), (0.5, None, 100, None), (0.8, None, 100, None),
        (None, 11, 100, (None, 22)), (None, 40, 100, (None, 50)), (None, 60, 100, None),
        (None, 40, None, (None, 80)),
    ]  # fmt: skip
    for ratio, tokens, N, raised in cases:
        kept = cautious("How many?", ratio, tokens, N)
        assert (kept and (kept.keep_ratio, kept.keep_tokens)) == raised
        assert cautious("What is it?", ratio, tokens, N) is None
    note = cautious("How many?", 0.1, None, 9).note
    assert note == (
        "the prompt asks for counting ('how many'), so 0.2 of the tokens stay in place of 0.1;"
        " --no-caution keeps 0.1"
    )


def test_drawn_pages_are_documents_and_scenes_and_photographs_are_not(shared_data):
    pages = [draw(pages_world.compose(1_000_000_100 + n)) for n in range(18)]
    assert sum(map(is_document, pages)) >= 16
    assert not any(is_document(compose(1_000_000_100 + n).image()) for n in range(12))
    photographs = sorted((shared_data / "images").glob("*.jpg"))
    assert len(photographs) > 10
    assert not any(is_document(Image.open(file)) for file in photographs)


def test_the_patches_of_a_picture_worked_by_hand():
    picture = Image.new("RGB", (42, 28), "white")
    picture.paste((0, 0, 0), (14, 0, 28, 14))
    assert [set(patch) for patch in patches(picture).tolist()] == [
        {255}, {0}, {255}, {255}, {255}, {255},
    ]  # fmt: skip
    assert is_document(picture)
    assert not is_document(Image.new("RGB", (40, 30), (150, 150, 150)))  # no paper
    half = picture.copy()
    half.paste((90, 0, 0), (0, 0, 42, 20))
    assert not is_document(half)
    assert patches(Image.new("L", (1792, 3))).shape == (32, 196)


def test_a_document_keeps_more_whatever_is_asked():
    page, scene = draw(pages_world.compose(1_000_000_100)), compose(1_000_000_100).image()
    kept = cautious("What is it?", 0.1, None, None, lambda: [scene, page])
    assert kept.keep_ratio == 0.2
    assert kept.note.startswith(
        "a picture is a document, so 0.2 of the tokens stay in place of 0.1"
    )
    assert cautious("What is it?", 0.1, None, None, lambda: [scene]) is None
    assert cautious("What is it?", 0.6, None, None, lambda: 1 / 0) is None  # nothing to raise
    known = ModelFacts("llava", None, True, 32, None, lambda spec, share: True)
    assert choose(known, 0.1, None, "What is it?", lambda: [page]).keep_ratio == 0.2
