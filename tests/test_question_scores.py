"""Scoring rules of the question formats, against examples worked out by hand."""

import pytest

from mlx_vlm_prune.evaluation.questions import (
    FORMATS,
    Question,
    format_of,
    mmbench,
    mme,
    pope,
    refcoco,
    scienceqa,
    textvqa,
)
from mlx_vlm_prune.evaluation.questions.vqa_normalise import normalise


def question(*answers: str, kind="all", group="", scoring_data=None) -> Question:
    return Question("1", "?", answers, b"", kind, group, scoring_data)


def voted(*answers: str) -> Question:
    return question(*answers, scoring_data=tuple(normalise(answer) for answer in answers))


@pytest.mark.parametrize("name", ["own", "scenes", "llava", "minimind", "gqa"])
@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("grey", 1),
        ("  Gray.\n", 1),
        ("Light  grey", 1),
        ("grey..", 0),  # one full stop is a sentence's end, two are not
        ("grey!", 0),
        ("it is grey", 0),
        ("", 0),
    ],
)
def test_exact_match_forgives_case_white_space_and_a_full_stop(name, response, right):
    grey = question("Grey", "gray", "light grey")
    assert format_of(name).score(grey, response) == right


@pytest.mark.parametrize(
    ("response", "meaning"),
    [
        ("No, there is not.", "no"),
        ("No", "no"),
        ("There is not a dog", "no"),
        ("Yes. There is no cat.", "yes"),  # only the first sentence counts
        ("no,", "no"),
        ("NO", "yes"),  # the rule knows "No" and "no"
        ("None of them", "yes"),
        ("There isn't", "yes"),
        ("", "yes"),
    ],
)
def test_pope_takes_no_and_not_in_the_first_sentence_for_no(response, meaning):
    assert pope.yes_or_no(response) == meaning
    assert pope.score(question("yes"), response) == (meaning == "yes")
    assert pope.score(question("no"), response) == (meaning == "no")


def test_pope_reports_precision_recall_f1_and_the_share_of_yes():
    labels = ["yes", "yes", "yes", "no", "no", "no", "no", "no"]
    responses = ["Yes", "Yes", "No", "Yes", "No", "No", "No", "No"]
    figures = pope.extra_figures([question(label) for label in labels], responses, [])
    # yes: right 2, predicted 3, actual 3; right 2 + 4 of 8
    assert figures == pytest.approx(
        {
            "accuracy": 75.0,
            "precision": 200 / 3,
            "recall": 200 / 3,
            "F1": 200 / 3,
            "share of yes": 37.5,
        }
    )


def test_pope_of_nothing_but_no_divides_by_nothing():
    figures = pope.extra_figures([question("no"), question("no")], ["no", "no"], [])
    assert (figures["accuracy"], figures["precision"], figures["F1"]) == (100, 0, 0)


@pytest.mark.parametrize(
    ("agreed", "points"),
    # Leaving one of the m out, which happens m times of ten, m - 1 agree; else all m do:
    # m = 1: (1*0 + 9*1/3)/10, m = 2: (2*1/3 + 8*2/3)/10, m = 3: (3*2/3 + 7)/10
    [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)],
)
def test_textvqa_averages_over_the_ten_ways_to_leave_one_out(agreed, points):
    others = [f"other {n}" for n in range(10 - agreed)]
    cola = voted(*["Coca Cola"] * agreed, *others)
    assert textvqa.score(cola, "coca cola") == pytest.approx(points)


@pytest.mark.parametrize(
    ("response", "normal"),
    [
        ("The Cat", "cat"),
        ("a two  an\tdogs", "2 dogs"),
        ("None", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.50", "3.50"),
        ("U.S.A.", "usa"),
        ("yes-no", "yes no"),
        ("yes - no", "yes no"),  # the sign goes, and two spaces are one
        ("e-mail - x-ray", "email xray"),  # one sign beside a space: all of its kind go
        ("why?", "why"),
        ("dont", "don't"),
        ("cant", "can't"),
        ("wont", "won't"),
        ("couldnt've", "couldn't've"),
        ("shouldntve", "shouldntve"),
        ("thats", "that's"),
        ("Joe's bar", "joe 's bar"),
        ("it's", "it 's"),
        ("oclock", "o'clock"),
        ("(left) [right]", "left right"),
        ("well", "well"),  # a word, not "we'll"
    ],
)
def test_vqa_normalisation_follows_the_published_order(response, normal):
    assert normalise(response) == normal


def test_textvqa_compares_after_normalising_both_sides():
    cola = voted(*["The 2 dogs."] * 5, *["two dogs"] * 5)
    assert textvqa.score(cola, "Two dogs!") == 1


COLOURS = ("red", "green", "blue", "dark blue")


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C) blue", "C"),
        ("The answer is D: dark blue", "D"),
        ("A or B", ""),  # two letters, and no option's text
        ("A small car stands there on a green lawn", "B"),  # A is too far from the end
        ("It is green.", "B"),
        ("GREEN", "B"),
        ("dark blue", ""),  # holds the text of blue too
        ("E", ""),
        ("", ""),
        ("it may be green " * 10, ""),  # far longer than all options
    ],
)
def test_mmbench_takes_a_lone_letter_or_the_text_of_one_option(response, letter):
    assert mmbench.chosen_letter(response, COLOURS) == letter


def test_mmbench_counts_a_question_only_if_every_rotation_is_right():
    assert mmbench.group_score([1, 1, 1, 1]) == 1
    assert mmbench.group_score([1, 1, 0, 1]) == 0
    assert mmbench.group_score([0, 0]) == 0


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("B.", "B"),
        ("B. Massachusetts", "B"),
        ("The answer is B.", "B"),
        ("Sure: The answer is C", "C"),
        ("The answer is B", "B"),
        ("B\nbecause", ""),
        ("The answer is A. No: The answer is B.", ""),
        ("The answer is Boston", ""),
        ("A. no. The answer is B", "A"),
        ("b", ""),
        ("Because", ""),
        ("the colony is Massachusetts", ""),
        ("F", ""),
        ("", ""),
    ],
)
def test_scienceqa_takes_the_letter_in_three_forms(response, letter):
    assert scienceqa.chosen_letter(response) == letter
    assert scienceqa.score(question("B"), response) == (letter == "B")


@pytest.mark.parametrize(
    ("response", "meaning"),
    [
        ("Yes", "yes"),
        ("yes, it is", "yes"),
        ("No.", "no"),
        ("not at all", "no"),
        ("I know", "other"),  # "i kn"
        ("Oh, yes", "other"),
        ("snow", "no"),  # four characters that hold "no"
        ("", "other"),
    ],
)
def test_mme_looks_at_the_first_four_characters(response, meaning):
    assert mme.yes_or_no(response) == meaning


def test_mme_adds_accuracy_and_accuracy_plus():
    # Three images: both right, one right, none right.
    groups = [[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]
    scores = [mme.group_score(scores) for scores in groups]
    assert scores == [2.0, 0.5, 0.0]
    # accuracy 3 of 6, accuracy+ 1 of 3: 50 + 33.3
    assert 100 * sum(scores) / 3 == pytest.approx(50 + 100 / 3)
    assert (format_of("mme").total, format_of("mme").unit, format_of("mme").scale) == (
        "sum",
        "",
        100,
    )


def test_mme_sums_perception_and_cognition_apart():
    questions, responses = [], []
    for kind, answers in (
        ("count", ("yes", "no")),  # both right: 100 + 100
        ("OCR", ("yes", "yes")),  # one right: 50 + 0
        ("code_reasoning", ("no", "yes")),  # none right
        ("mine", ("yes", "no")),  # no subtask of either
    ):
        questions += [question(label, kind=kind, group=f"{kind}/1") for label in ("yes", "no")]
        responses += answers
    scores = [mme.score(*pair) for pair in zip(questions, responses, strict=True)]
    assert mme.extra_figures(questions, [], scores) == {"perception": 250, "cognition": 0}
    assert mme.extra_figures(questions[:4], [], scores[:4]) == {"perception": 250}


@pytest.mark.parametrize(
    ("response", "unit", "right"),
    [
        # The true box is x 0 to 100, y 0 to 50 of an image of 100 x 200.
        ("[0, 0, 1, 0.25]", "unit", 1),
        ("[0, 0, 1, 0.125]", "unit", 1),  # half of it: an IoU of exactly 0.5
        ("[0, 0, 1, 0.5]", "unit", 1),  # twice as high: exactly 0.5 as well
        ("[0, 0, 1, 0.124]", "unit", 0),
        ("[0, 0, 1, 0.501]", "unit", 0),
        ("[0.00, 0.25, 1.00, 0.5]", "unit", 0),  # touches it only
        ("[1, 0.25, 0, 0]", "unit", 0),  # inside out
        ("The box is [0,0,1,.25].", "unit", 1),
        ("(0, 0), (1, 0.25)", "unit", 1),
        ("[0, 0, 1]", "unit", 0),
        ("nowhere", "unit", 0),
        ("<box>(0,0),(1000,250)</box>", "thousand", 1),
        ("[0, 0, 1000, 125]", "thousand", 1),
        ("[0, 0, 1, 0.25]", "thousand", 0),
        ("[0, 0, 100, 50]", "pixels", 1),
        ("0 0 100 25", "pixels", 1),
        ("[0, 0, 100, 24]", "pixels", 0),
    ],
)
def test_refcoco_wants_an_overlap_of_at_least_half(response, unit, right):
    scoring_data = ((0.0, 0.0, 100.0, 50.0), (100, 200), unit)
    assert refcoco.score(question("", scoring_data=scoring_data), response) == right


def test_the_iou_of_two_shifted_squares_is_a_third():
    assert refcoco.iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert refcoco.iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1
    assert refcoco.iou((0, 0, 2, 2), (1, 1, 1, 1)) == 0


def test_formats_without_a_rule_for_groups_take_the_mean():
    for name in set(FORMATS) - {"mme", "mmbench", "mmbench-rows"}:
        assert format_of(name).group_score([1.0, 0.0, 0.0, 1.0]) == 0.5
        assert format_of(name).total == "mean"
        assert format_of(name).unit == ("" if name == "captions" else "%")
