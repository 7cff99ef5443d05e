"""Question formats that are tables, folders and untrusted pickles: reading, and refusals."""

import base64
import json
import pickle

import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.questions import BadRecords, format_of
from mlx_vlm_prune.evaluation.questions.plain_pickle import read_plain_pickle

from .test_questions import images, png, read, write

COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "l2-category")


IMAGE = base64.b64encode(png()).decode()


def table(path, *rows):
    """A TSV file; a row without an image gets one."""
    cells = [row if len(row) > len(COLUMNS) else (*row, IMAGE) for row in rows]
    lines = ["\t".join(row) for row in [(*COLUMNS, "image"), *cells]]
    path.write_text("\n".join(lines) + "\n")
    return path


ROW = ("7", '"Which\ncolour?"', "nan", "red", "green", "blue", "", "B", "colour", "attributes")


def test_mmbench_asks_a_question_in_every_rotation(tmp_path):
    questions = read("mmbench", table(tmp_path / "m.tsv", ROW, ("1000007", *ROW[1:])))
    assert [(q.id, q.answers, q.group) for q in questions] == [
        ("7-0", ("B",), "7"),
        ("7-1", ("A",), "7"),
        ("7-2", ("C",), "7"),
    ]
    assert {(q.kind, q.image) for q in questions} == {("attributes", png())}
    assert questions[1].text == (
        "Which\ncolour?\nA. green\nB. blue\nC. red\n"
        "Answer with the option's letter from the given choices directly."
    )
    mmbench = format_of("mmbench")
    responses = ["B", "It is green", "the third: C."]
    scores = [mmbench.score(q, response) for q, response in zip(questions, responses, strict=True)]
    assert mmbench.group_score(scores) == 1
    # Who always says B is right once in three rotations, and that is not enough.
    assert mmbench.group_score([mmbench.score(q, "B") for q in questions]) == 0


def test_mmbench_needs_all_four_of_four_rotations(tmp_path):
    row = ("1", "Q", "a hint", "red", "green", "blue", "grey", "D", "colour", "")
    questions = read("mmbench", table(tmp_path / "m.tsv", row))
    mmbench = format_of("mmbench")
    assert [q.answers[0] for q in questions] == ["D", "C", "B", "A"]
    assert questions[0].text.startswith("a hint\nQ\nA. red\n")
    assert questions[0].kind == "colour"
    three = [mmbench.score(q, response) for q, response in zip(questions, "DCBB", strict=True)]
    assert (sum(three), mmbench.group_score(three)) == (3, 0)
    assert mmbench.group_score([mmbench.score(q, "grey") for q in questions]) == 1


def test_mmbench_rows_may_share_the_image_of_an_earlier_one(tmp_path):
    path = table(tmp_path / "m.tsv", ROW, ("8", *ROW[1:], "7"), ("9", *ROW[1:], "70"))
    questions = read("mmbench", path, bad := BadRecords(skip=True))
    assert questions[-1].id == "8-2"
    assert questions[-1].image is questions[0].image
    assert "its image is that of row 70" in bad.messages[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({7: "E"}, "answer is 'E'; it is one of A, B, C"),
        ({7: ""}, "answer is empty"),
        ({4: ""}, "there are fewer than two options"),
        ({0: ""}, "index is empty"),
        ({10: "%%%"}, "image is not valid base64"),
        ({10: ""}, "image is empty"),
    ],
)
def test_mmbench_bad_rows_are_named(change, why, tmp_path):
    row = [*ROW, IMAGE]
    for column, value in change.items():
        row[column] = value
    with pytest.raises(UserError, match=rf"m\.tsv, line 3: {why}"):
        read("mmbench", table(tmp_path / "m.tsv", row))


def test_mmbench_columns_are_checked_at_once(tmp_path):
    (tmp_path / "m.tsv").write_text("index\tquestion\n")
    with pytest.raises(UserError, match="no column A"):
        read("mmbench", tmp_path / "m.tsv")


def test_scienceqa_asks_questions_with_an_image(tmp_path):
    problem = {
        "question": "Which?",
        "choices": ["x", "y"],
        "answer": 1,
        "hint": "",
        "split": "test",
    }
    problem |= {"image": "image.png", "subject": "natural science"}
    problems = {
        "1": problem,
        "2": {**problem, "image": None},
        "3": {**problem, "hint": "Look."},
        "4": {**problem, "answer": 2},
    }
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"train": [], "test": ["1", "2", "3", "4", "5"]})
    images(tmp_path / "images" / "test", "1/image.png", "3/image.png", "4/image.png")
    first, third = read("scienceqa", tmp_path, bad := BadRecords(skip=True))
    assert (first.id, first.answers, first.kind) == ("1", ("B",), "natural science")
    letter = "Answer with the option's letter from the given choices directly."
    assert first.text == f"Which?\nA. x\nB. y\n{letter}"
    assert third.text == f"Which?\nContext: Look.\nA. x\nB. y\n{letter}"
    assert [message.split("question ")[1][0] for message in bad.messages] == ["4", "5"]
    assert read("scienceqa", tmp_path, split="train") == []
    with pytest.raises(UserError, match="no split 'val'; there are train, test"):
        read("scienceqa", tmp_path, split="val")


@pytest.mark.parametrize("in_subfolders", [False, True])
def test_mme_pairs_two_questions_with_an_image(in_subfolders, tmp_path):
    texts = tmp_path / "count" / ("questions_answers_YN" if in_subfolders else "")
    pictures = tmp_path / "count" / ("images" if in_subfolders else "")
    images(pictures, "01.jpg", "02.png")
    texts.mkdir(exist_ok=True)
    (texts / "01.txt").write_text("Is it one? Please answer yes or no.\tYes\nIs it two?\tNo\n")
    (texts / "02.txt").write_text("Is it one?\tYes\n")
    (tmp_path / "eval_tool").mkdir()
    (tmp_path / "eval_tool" / "readme.txt").write_text("not a question")
    yes, no = read("mme", tmp_path, bad := BadRecords(skip=True))
    assert (yes.text, yes.answers) == ("Is it one? Please answer yes or no.", ("yes",))
    assert (no.answers, no.kind, no.image) == (("no",), "count", pictures / "01.jpg")
    assert yes.group == no.group == "count/01"
    assert len(bad.messages) == 1
    assert "02.txt: there are 1 questions" in bad.messages[0]
    (texts / "01.txt").write_text("Is it one?\tperhaps\n")
    with pytest.raises(UserError, match=r"01\.txt: line 1 is not a question, a tab"):
        read("mme", tmp_path)


def coco(folder, refs, name="refs(unc).p", protocol=2):
    (folder / name).write_bytes(pickle.dumps(refs, protocol))
    image = {"id": 3, "file_name": "a.jpg", "width": 100, "height": 200}
    box = {"id": 4, "image_id": 3, "bbox": [0, 0, 100.0, 50]}
    write(folder / "instances.json", {"images": [image], "annotations": [box]})
    return images(folder / "train2014", "a.jpg")


REF = {
    "ref_id": 9, "ann_id": 4, "image_id": 3, "split": "testA", "file_name": "a_4.jpg",
    "sentences": [{"sent": "the red one", "tokens": ["the"]}, {"sent": "left"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("boxes", "answer"),
    [
        ("unit", "[0.00, 0.00, 1.00, 0.25]"),
        ("thousand", "[0, 0, 1000, 250]"),
        ("pixels", "[0, 0, 100, 50]"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_refcoco_asks_every_phrase_in_the_coordinates_chosen(boxes, answer, protocol, tmp_path):
    home = coco(tmp_path, [REF, {**REF, "ref_id": 10, "split": "train"}], protocol=protocol)
    questions = read("refcoco", tmp_path, images=home, boxes=boxes)
    assert [(q.id, q.kind, q.answers) for q in questions] == [
        ("9-1", "testA", (answer,)),
        ("9-2", "testA", (answer,)),
    ]
    assert ": the red one\nAnswer with [x1, y1, x2, y2]" in questions[0].text
    assert format_of("refcoco").score(questions[0], answer) == 1
    train = read("refcoco", tmp_path / "refs(unc).p", images=home, split="train")
    assert [q.id for q in train] == ["10-1", "10-2"]


def test_refcoco_names_bad_entries(tmp_path):
    faulty = [{**REF, "ann_id": 5}, {**REF, "sentences": None}, {**REF, "split": 3}, "no"]
    home = coco(tmp_path, [*faulty, REF])
    bad = BadRecords(skip=True)
    assert len(read("refcoco", tmp_path, bad, images=home)) == 2
    assert [message.split("entry ")[1][0] for message in bad.messages] == ["1", "2", "3", "4"]
    with pytest.raises(UserError, match="no split 'val'; there are testA"):
        read("refcoco", tmp_path, images=home, split="val")
    with pytest.raises(UserError, match="boxes is 'percent'; it is unit, thousand, pixels"):
        read("refcoco", tmp_path, images=home, boxes="percent")
    with pytest.raises(UserError, match="name the folder of COCO's train2014"):
        read("refcoco", tmp_path)


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_imports_anything_is_refused_and_not_executed(protocol, tmp_path):
    created = tmp_path / "created"
    home = coco(tmp_path, [REF, Evil(created)], protocol=protocol)
    with pytest.raises(UserError, match="holds more than plain data"):
        read("refcoco", tmp_path, BadRecords(skip=True), images=home)
    assert not created.exists()
    pickle.loads((tmp_path / "refs(unc).p").read_bytes())[1].close()
    assert created.exists()  # the pickle was not harmless


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02]q\x00",  # no end
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a place in a memo of 16 GB
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a text of 8 EB
        b"\x80\x02h\x05.",  # what was never stored
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"not a pickle",
    ],
)
def test_a_damaged_pickle_is_refused_in_one_sentence(data, tmp_path):
    (tmp_path / "refs.p").write_bytes(data)
    with pytest.raises(UserError, match=r"refs\.p .*") as refused:
        read_plain_pickle(tmp_path / "refs.p")
    assert "\n" not in str(refused.value)


def test_plain_pickles_of_python_2_are_read(tmp_path):
    (tmp_path / "refs.p").write_bytes(b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xe9'\np3\nsa.")
    assert read_plain_pickle(tmp_path / "refs.p") == [{"sent": "caf\N{REPLACEMENT CHARACTER}"}]


def test_a_wrong_instances_json_is_refused_by_name(tmp_path):
    home = coco(tmp_path, [REF])
    (tmp_path / "instances.json").write_text(json.dumps({"images": 3}))
    with pytest.raises(UserError, match=r"instances\.json has no list called images"):
        read("refcoco", tmp_path, images=home)
