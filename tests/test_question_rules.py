"""Each format's score is its authors' on 200 made cases; see question_rules.py for their rules."""

import random

import pytest

from mlx_vlm_prune.evaluation.questions import (
    Question,
    gqa,
    mme,
    mmmu,
    mmvet,
    pope,
    scienceqa,
    textvqa,
    vqav2,
)
from mlx_vlm_prune.evaluation.questions.vqa_normalise import CONTRACTIONS, normalise

from . import question_rules as rules

CASES = 200
WORDS = """
    yes no Yes No not NO The the a an cat dog two 2 three none ten dont can't shouldve Joe's it's
    he'd somebody'd yall'll let's 1,000 3.5 .5 5. U.S.A. red-brown (left) [x] a/b why? ok! stop;
    "sign" mustve shouldntve somethings oclock O'clock 12:30 50% $5 e-mail, x=3 <tag> back`tick
""".split()
JOINTS = (" ", " ", " ", "  ", "\n", "\t", " - ", ", ", ". ", "")


def made_text(rng: random.Random, words: list[str], most: int = 4) -> str:
    """A few words with odd joints between."""
    text = ""
    for _ in range(rng.randint(1, most)):
        text += rng.choice(words) + rng.choice(JOINTS)
    return text


def varied(rng: random.Random, text: str) -> str:
    """A text that a rule may or may not take for the same."""
    changes = [str, str.upper, str.capitalize, "the {}".format, "{}.".format, " {} ".format,
               "{}!".format, "{},".format]  # fmt: skip
    return rng.choice(changes)(text)


def question(*answers: str, scoring_data=None, name: str = "1") -> Question:
    return Question(name, "?", answers, b"", scoring_data=scoring_data)


def check(pairs: list[tuple[float, float]], least: int = 20) -> None:
    """All equal, and not all alike."""
    assert len(pairs) == CASES
    assert [ours for ours, _ in pairs] == pytest.approx([theirs for _, theirs in pairs])
    assert sum(theirs > 0 for _, theirs in pairs) >= least
    assert sum(theirs < 1 for _, theirs in pairs) >= least


def people(rng: random.Random) -> list[str]:
    """Ten answers, some of them alike."""
    forms = [made_text(rng, WORDS, 3) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.2:  # all agree
        return [rng.choice(["yes", "no", "2", "red-brown", "the cat", "Yes"])] * 10
    return [varied(rng, rng.choice(forms)) for _ in range(10)]


def test_contractions_are_the_published_ones_in_lower_case():
    published = {a: b for a, b in rules.CONTRACTIONS.items() if a == a.lower() and a != b}
    assert published == CONTRACTIONS


def test_textvqa_is_llavas_evaluator():
    rng, pairs = random.Random(1), []
    for _ in range(CASES):
        answers = people(rng)
        ten = question(*answers, scoring_data=tuple(map(normalise, answers)))
        response = varied(rng, rng.choice([*answers, made_text(rng, WORDS)]))
        assert normalise(response) == rules.m4c_processor(response)
        pairs.append((textvqa.score(ten, response), rules.textvqa_accuracy(response, answers)))
    check(pairs)


def annotated(answers: list[str]) -> Question:
    record = {"answers": [{"answer": a, "answer_id": n} for n, a in enumerate(answers, 1)]}
    return vqav2._annotated({"1": record}, question())


def test_vqav2_is_the_authors_script_on_normalised_responses():
    rng, pairs = random.Random(2), []
    for _ in range(CASES):
        answers = people(rng)
        response = varied(rng, rng.choice([*answers, made_text(rng, WORDS)]))
        theirs = rules.vqa_accuracy(rules.m4c_processor(response), answers)
        pairs.append((vqav2.score(annotated(answers), response), theirs))
    check(pairs)


def test_vqav2_takes_answers_as_they_stand_where_all_people_agree():
    assert vqav2.score(annotated(["yes"] * 10), "Yes.") == 1
    assert rules.vqa_accuracy("Yes.", ["yes"] * 10) == 0  # not normalised first
    assert vqav2.score(annotated(["the cat"] * 10), "the cat") == 0  # as the script has it
    assert vqav2.score(annotated(["the cat"] * 9 + ["cat"]), "the cat") == 1


@pytest.mark.parametrize(("agreed", "points"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1)])
def test_vqav2_leaves_each_of_ten_people_out(agreed, points):
    ten = annotated(["cola"] * agreed + [f"other {n}" for n in range(10 - agreed)])
    assert vqav2.score(ten, "Cola") == pytest.approx(points)


def test_pope_is_the_authors_script():
    rng, pairs = random.Random(3), []
    for _ in range(CASES):
        response = made_text(rng, ["Yes", "No", "no", "not", "NO", "yes", "there", "is", "isn't"])
        label = rng.choice(["yes", "no"])
        theirs = float(rules.pope_meaning(response.strip()) == label)
        pairs.append((pope.score(question(label), response), theirs))
    check(pairs)


def test_mme_is_the_authors_script():
    rng, pairs = random.Random(4), []
    for _ in range(CASES):
        response = made_text(rng, ["Yes", "No", "no", "not", "Oh", "yes", "snow", "I", "eyes"])
        label = rng.choice(["yes", "no"])
        pairs.append(
            (mme.score(question(label), response), float(rules.mme_meaning(response) == label))
        )
    check(pairs)


def test_gqa_is_equality_after_llavas_conversion():
    rng, pairs = random.Random(5), []
    for _ in range(CASES):
        answer = rng.choice(["red", "left side", "yes", "t-shirt"])
        response = rng.choice(["{}", "{}.", "The {}", "{}, {}"]).replace("{}", answer)
        response = rng.choice([response, response.capitalize(), response.upper(), "no"])
        theirs = float(response.rstrip(".").lower() == answer)
        pairs.append((gqa.score(question(answer), response), theirs))
    check(pairs)


def test_scienceqa_of_llavas_files_is_llavas_script():
    rng, pairs = random.Random(6), []
    forms = ("{}", "{}.", "{}. red", "The answer is {}.", "The answer is {}", "So {}", "{} {}",
             "The answer is {}. The answer is C.", "The answer is {}oston", "{}.red")  # fmt: skip
    for _ in range(CASES):
        right, letter = rng.choice("AB"), rng.choice("ABBAFb")
        response = rng.choice(forms).replace("{}", letter)
        ours = scienceqa.score(question(right, scoring_data=scienceqa.PUBLISHED), response)
        pairs.append((ours, float(rules.scienceqa_letter(response) == right)))
    check(pairs)


OPTIONS = ["red", "dark red", "12.5 m/s", "None of the above", "Saturn"]
CHOICE_PARTS = """(A)|(B)|A|B|C|D,|(c)|the answer is|dark red|RED|12.5 m/s|saturn|not|B.
|I think that it must be|none of the above""".replace("\n", "").split("|")
OPEN_PARTS = [
    *"so|the answer is|x =|=|12|12.004|1,200|1.2e3|-3|60 watts|therefore|it could be".split("|"),
    *("transformer", "final result", "\n", ".", "m", "W", "about"),
]
OPEN_ANSWERS = [one.split("|") for one in "12 1200 -3 w Transformer watts|60 12.00 m".split()]


def test_mmmu_options_are_the_authors_parser_with_a_guess_that_repeats():
    rng, pairs, guesses = random.Random(7), [], []
    for n in range(CASES):
        options, name = tuple(OPTIONS[: rng.randint(2, 5)]), f"validation_Math_{n}"
        response = made_text(rng, CHOICE_PARTS, 5)
        guess = mmmu.chosen_letter("", options, name)
        letter = mmmu.chosen_letter(response, options, name)
        assert letter == rules.mmmu_letter(response, list(options), guess), response
        guesses.append(guess)
        right = rng.choice("AB")
        ours = mmmu.score(question(right, scoring_data=options, name=name), response)
        pairs.append((ours, float(letter == right)))
    check(pairs)
    assert set(guesses) == set("ABCDE")


def test_mmmu_open_answers_are_the_authors_parser():
    rng, pairs = random.Random(8), []
    for _ in range(CASES):
        answers = rng.choice(OPEN_ANSWERS)
        response = made_text(rng, OPEN_PARTS, 6)
        theirs = float(rules.mmmu_open_is_right(response, answers))
        ours = mmmu.score(question(*answers, scoring_data=()), response)
        assert ours == theirs, (response, answers)
        pairs.append((ours, theirs))
    check(pairs)


def test_mmmu_parts_of_a_response_are_the_authors():
    assert mmmu.open_answers("So the result is 36 watts.") == ["36 watts", 36.0]
    assert mmmu.open_answers("x = 3") == [3.0, 3.0]
    assert mmmu.open_answers("1,234.5 or 2e3")[0] == "1,234.5 or 2e3"


def test_mmvet_figures_are_means_over_each_capability():
    rng, data, grades = random.Random(9), {}, {}
    for n in range(CASES):
        abilities = rng.sample(["rec", "ocr", "know", "gen", "spat", "math"], rng.randint(1, 4))
        data[f"v1_{n}"] = {"capability": abilities, "question": "?", "answer": "x"}
        grades[f"v1_{n}"] = rng.choice([0.0, 0.1, 0.5, 1.0])
    questions = [mmvet._annotated(question(name=name), record) for name, record in data.items()]
    theirs = rules.mmvet_scores(grades, data)
    figures = mmvet.extra_figures(questions, [], list(grades.values()))
    total = theirs.pop("total")
    assert figures == pytest.approx(theirs)
    assert 100 * sum(grades.values()) / CASES == pytest.approx(total)
    ranked = [sum(ability in q.kind for q in questions) for ability in figures]
    assert ranked == sorted(ranked, reverse=True)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.5", 0.5), ("1.0 because", 1.0), ("0.3\n", 0.3), ("1", 1.0), ("1.5", None), ("-0.1", None),
     ("good", None), ("", None), (" 0.4", None), ("nan", None)],
)  # fmt: skip
def test_mmvet_reads_a_grade_as_the_authors_do(reply, grade):
    assert mmvet.parse_grade(reply) == grade
