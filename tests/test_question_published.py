"""VQAv2, MMMU and MM-Vet as they are published: reading, joining the right answers, uploads."""

import hashlib
import json

import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.questions import Source, format_of

from .test_questions import images, png, read, write

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


def vqa(folder, split="val2014", annotated=True):
    """Two questions as published, with ten answers each."""
    picture = split.replace("test-dev", "test")
    images(folder / picture, f"COCO_{picture}_000000000042.jpg")
    records = [{"question_id": n, "image_id": 42, "question": f"What {n}?"} for n in (420, 421)]
    write(folder / f"v2_OpenEnded_mscoco_{split}_questions.json",
          {"questions": records, "data_subtype": split})  # fmt: skip
    answers = [{"answer": a, "answer_id": n} for n, a in enumerate(["one"] * 4 + ["two"] * 6, 1)]
    notes = [{"question_id": n, "answers": answers, "answer_type": "number"} for n in (420, 421)]
    if annotated:
        write(folder / f"v2_mscoco_{split}_annotations.json", {"annotations": notes})
    return folder / f"v2_OpenEnded_mscoco_{split}_questions.json"


def test_vqav2_joins_questions_annotations_and_images(tmp_path):
    path = vqa(tmp_path)
    first, second = read("vqav2", tmp_path)
    assert read("vqav2", path) == [first, second]
    assert (first.id, first.text, first.kind) == ("420", "What 420?" + SHORT, "number")
    assert first.answers == ("two", "one")
    assert first.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert format_of("vqav2").score(first, "One.") == 1
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": []})
    with pytest.raises(UserError, match="record 1: there is no annotation"):
        read("vqav2", path)
    with pytest.raises(UserError, match="no file such as v2_OpenEnded_mscoco_train2014"):
        read("vqav2", tmp_path, split="train2014")


def test_vqav2_of_the_server_is_not_scored_and_uploads_every_question_of_the_test(tmp_path):
    path = vqa(tmp_path, "test-dev2015", annotated=False)
    vqa(tmp_path, "test2015", annotated=False)
    rest = {"question_id": 7, "image_id": 42, "question": "More?"}
    write(tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": [rest]})
    questions = read("vqav2", path)
    format = format_of("vqav2")
    assert [q.answers for q in questions] == [(), ()] and not format.is_scored(questions)
    upload = format.upload(questions, ["The Two dogs!", "yes"], Source(path))
    assert json.loads(upload[".json"]) == [
        {"question_id": 420, "answer": "2 dogs"},
        {"question_id": 421, "answer": "yes"},
        {"question_id": 7, "answer": ""},
    ]


OPTIONS = "['red', \"it's <image 1>\", '12']"


def mmmu_rows(**changes):
    row = {"id": "validation_Math_1", "question": "What <image 1>?", "options": OPTIONS,
           "image_1": {"bytes": png(), "path": "a.png"}, "answer": "B",
           "question_type": "multiple-choice"}  # fmt: skip
    return row | changes


def parquet(path, *rows):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet files")
    from pyarrow.parquet import write_table

    path.parent.mkdir(exist_ok=True)
    write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def test_mmmu_reads_the_subjects_of_a_split(tmp_path):
    plain = {"question_type": "open", "options": "[]"}
    math = parquet(tmp_path / "Math" / "validation-00000-of-00001.parquet", mmmu_rows(),
                   mmmu_rows(id="validation_Math_2", answer="['3', '3.0']", **plain))  # fmt: skip
    parquet(tmp_path / "Art" / "validation-00000-of-00001.parquet",
            mmmu_rows(id="validation_Art_1", answer="12", **plain))  # fmt: skip
    parquet(tmp_path / "Art" / "test-00000-of-00001.parquet",
            mmmu_rows(id="test_Art_1", answer="?"))  # fmt: skip
    art, choice, number = read("mmmu", tmp_path)
    assert (choice.id, choice.kind, choice.answers) == ("validation_Math_1", "Math", ("B",))
    assert choice.text == f"What <image 1>?\n(A) red\n(B) it's <image 1>\n(C) 12\n{LETTER}"
    assert choice.image == png() and choice.more_images == ()
    assert (art.kind, art.answers, art.text) == ("Art", ("12",), "What <image 1>?" + SHORT)
    assert number.answers == ("3", "3.0")
    assert [q.id for q in read("mmmu", math)] == [choice.id, number.id]
    format = format_of("mmmu")
    assert [format.score(choice, text) for text in ("(B)", "A", "I say it's <image 1> or so")] == [
        1, 0, 1,
    ]  # fmt: skip
    figures = format.extra_figures([art, choice, number], ["", "", ""], [1.0, 1.0, 0.0])
    assert figures == {"Art": 100, "Science": 50}
    upload = format.upload([art, choice], ["So 12", "it is C"], Source(tmp_path))
    assert json.loads(upload[".json"]) == {art.id: "So 12", choice.id: "C"}
    (hidden,) = read("mmmu", tmp_path, split="test")
    assert not hidden.answers and not format.is_scored([hidden])
    with pytest.raises(UserError, match="no file such as Accounting/dev-00000"):
        read("mmmu", tmp_path, split="dev")


def test_mmmu_questions_have_all_their_images(tmp_path):
    cells = {"image_2": {"bytes": png("blue"), "path": "b.png"}, "image_3": None}
    path = parquet(tmp_path / "m.parquet", mmmu_rows(**cells, image_7=png("green")))
    (question,) = read("mmmu", path)
    assert question.more_images == (png("blue"), png("green"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"options": "[1"}, "not a list of texts"),
        ({"options": "('a', 'b')"}, "not a list of texts"),
        ({"options": "__import__('os')"}, "not a list of texts"),
        ({"options": "[" * 500 + "]" * 500}, "not a list of texts"),
        ({"options": "[]"}, "there are 0 options"),
        ({"answer": "D"}, "answer is 'D'; it is one of A, B, C"),
        ({"answer": ""}, "answer is empty"),
        ({"image_1": {"bytes": b"", "path": "a.png"}}, "image_1 holds no image"),
    ],
)
def test_mmmu_bad_rows_are_named(change, why, tmp_path):
    path = parquet(tmp_path / "m.parquet", mmmu_rows(**change))
    with pytest.raises(UserError, match=rf"m\.parquet, row 1: .*{why}"):
        read("mmmu", path)


VET = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "-1<AND>-5",
             "capability": ["ocr", "math"]},
    "v1_1": {"imagename": "v1_1.png", "question": "Left?", "answer": "table lamp<OR>desk lamp",
             "capability": ["spat"]},
}  # fmt: skip


def test_mmvet_reads_its_folder_and_asks_its_judge_as_published(tmp_path):
    write(tmp_path / "mm-vet.json", VET)
    images(tmp_path / "images", "v1_0.png", "v1_1.png")
    first, second = read("mmvet", tmp_path)
    assert (first.id, first.text, first.kind) == ("v1_0", "What is x?", "math_ocr")
    assert (first.answers, second.answers) == (("-1, -5",), ("table lamp",))
    format = format_of("mmvet")
    digest = hashlib.sha256(format.module.GRADING.encode()).hexdigest()
    assert digest[:16] == "d1b3e0a5b4e72c88", "the authors' prompt, letter by letter"
    prompt = format.module.grade_prompt(first, "x = 1")
    assert prompt.startswith("Compare the ground truth and prediction from AI models, to give")
    assert "Just complete the last space of the correctness score.\n\nQuestion | Ground" in prompt
    assert prompt.endswith(" | 1.0\n\nWhat is x? | -1 <AND> -5 | x = 1 | ")
    again = format.module.grade_prompt(first, "x = 1", again=True)
    assert again == prompt + "\nPredict the correctness of the answer (digit): "
    assert not format.is_scored([first]) and format.needs_grader
    upload = format.upload([first, second], ["x = 1", "lamp"], Source(tmp_path))
    assert json.loads(upload[".json"]) == {"v1_0": "x = 1", "v1_1": "lamp"}
