"""LLaVA's prepared files: its prompts, the right answers joined from beside, files for uploads."""

import base64
import io
import json
import zipfile
from xml.etree import ElementTree

import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.questions import BadRecords, Source, format_of
from mlx_vlm_prune.evaluation.questions.xlsx import MAIN, spreadsheet

from .test_question_published import LETTER, SHORT, VET
from .test_questions import images, png, read, write


def test_mmvet_of_llava_finds_its_answers_beside(tmp_path):
    line = {"question_id": 0, "image": "v1_0.png", "text": "What is x?", "category": "default"}
    path = write(tmp_path / "llava-mm-vet.jsonl", [line])
    images(tmp_path / "images", "v1_0.png")
    (bare,) = read("mmvet", path)
    assert (bare.id, bare.answers, bare.kind) == ("v1_0", (), "all")
    assert bare.record == {"question_id": 0, "prompt": "What is x?"}
    write(tmp_path / "mm-vet.json", VET)
    (joined,) = read("mmvet", path)
    assert (joined.id, joined.answers, joined.kind) == ("v1_0", ("-1, -5",), "math_ocr")


def lines(path, *texts, image="a.jpg", **more):
    rows = [{"question_id": n, "image": image, "text": text, "category": "default", **more}
            for n, text in enumerate(texts)]  # fmt: skip
    return write(path, rows)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("llava_pope_test.jsonl", "pope"),
        ("llava_gqa_testdev_balanced.jsonl", "gqa"),
        ("llava_mme.jsonl", "mme"),
        ("llava_vqav2_mscoco_test-dev2015.jsonl", "vqav2"),
        ("llava_textvqa_val_v051_ocr.jsonl", "textvqa"),
        ("llava_test_CQM-A.json", "scienceqa"),
        ("llava-mm-vet.jsonl", "mmvet"),
        ("mmbench_dev_20230712.tsv", "mmbench-rows"),
        ("llava_test.jsonl", "llava-eval"),
        ("questions.jsonl", "llava-eval"),
    ],
)
def test_a_prepared_files_name_tells_its_format(name, format, tmp_path):
    assert format_of("llava-eval", tmp_path / name).name == format


@pytest.mark.parametrize("name", ["pope", "gqa", "mme", "vqav2", "textvqa", "mmvet", "llava-eval"])
def test_prepared_files_alone_are_asked_as_they_stand_and_not_scored(name, tmp_path):
    images(tmp_path, "a.jpg")
    questions = read(name, lines(tmp_path / "llava_x.jsonl", "Is it? ", "What?" + SHORT))
    assert [q.text for q in questions] == ["Is it? ", "What?" + SHORT]
    assert [q.record for q in questions] == [
        {"question_id": 0, "prompt": "Is it? "},
        {"question_id": 1, "prompt": "What?" + SHORT},
    ]
    assert not format_of(name).is_scored(questions)
    again = write(tmp_path / "llava_y.jsonl", [json.loads(line) | {"question_id": 5} for line in
                  (tmp_path / "llava_x.jsonl").read_text().splitlines()])  # fmt: skip
    assert len({q.id for q in read(name, again)}) == 2, "some files repeat ids"


def test_vizwiz_uploads_images_with_normalised_answers(tmp_path):
    images(tmp_path / "test", "a.jpg")
    path = lines(tmp_path / "llava_test.jsonl", "What?" + SHORT)
    upload = format_of("llava-eval").upload(read("llava-eval", path), ["The Dogs!"], Source(path))
    assert json.loads(upload[".json"]) == [{"image": "a.jpg", "answer": "dogs"}]


def test_pope_of_llava_gets_its_labels_by_kind_image_and_text(tmp_path):
    path = lines(tmp_path / "llava_pope_test.jsonl", "Is there a dog?" + SHORT, category="random")
    images(tmp_path / "val2014", "a.jpg")
    label = {"question_id": 9, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}
    write(tmp_path / "coco" / "coco_pope_random.json", {}).write_text(json.dumps(label) + "\n")
    (question,) = read("pope", path)
    assert (question.id, question.kind, question.answers) == ("random-0", "random", ("no",))
    lines(path, "Is there a cat?" + SHORT, category="random")
    with pytest.raises(UserError, match="labels do not have this question of random"):
        read("pope", path)
    (tmp_path / "coco" / "coco_pope_random.json").write_text("{\n")
    with pytest.raises(UserError, match=r"coco_pope_random\.json, line 1: this is not valid JSON"):
        read("pope", path)


def test_gqa_of_llava_joins_by_id_and_uploads_predictions(tmp_path):
    path = lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", "Is it red?" + SHORT)
    images(tmp_path / "data" / "images", "a.jpg")
    record = {
        "question": "Is it red?",
        "imageId": "a",
        "answer": "yes",
        "types": {"structural": "verify"},
    }
    write(tmp_path / "data" / "testdev_balanced_questions.json", {"0": record})
    (question,) = read("gqa", path)
    assert (question.answers, question.kind) == (("yes",), "verify")
    upload = format_of("gqa").upload([question], ["Yes."], Source(path))
    assert json.loads(upload[".json"]) == [{"questionId": "0", "prediction": "yes"}]


def test_textvqa_of_llava_joins_by_image_and_text(tmp_path):
    answers = ["stop"] * 10
    other = {"image_id": "a", "question": "Who?", "question_id": 4, "answers": ["me"] * 10}
    record = {
        "image_id": "a",
        "question": "What does it SAY?",
        "question_id": 3,
        "answers": answers,
    }
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [other, record]})
    images(tmp_path / "train_images", "a.jpg")
    texts = [
        "What does it say?\nReference OCR token: STOP, NOW" + SHORT,
        "Reference OCR token: STOP\nWhat does it say?" + SHORT,
        "OCR tokens: STOP. Question: What does it say? Short answer:",
        "What does it say?" + SHORT,
    ]
    for text in texts:
        line = {"question_id": "a", "image": "a.jpg", "text": text, "category": "default"}
        path = write(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [line])
        (question,) = read("textvqa", path)
        assert (question.id, question.answers) == ("3", ("stop",))
        assert question.record == {"question_id": "a", "prompt": text}


def test_mme_of_llava_pairs_questions_and_uploads_a_file_for_each_subtask(tmp_path):
    folder = tmp_path / "MME_Benchmark_release_version" / "count"
    images(folder, "1.jpg")
    (folder / "1.txt").write_text(
        "Is it one?  Please answer yes or no.\tYes\nIs it two? Please answer yes or no.\tNo\n"
    )
    rows = [{"question_id": "count/1.jpg", "image": "count/1.jpg", "text": text + SHORT}
            for text in ("Is it one?", "Is it two? Please answer yes or no.")]  # fmt: skip
    path = write(tmp_path / "llava_mme.jsonl", rows)
    questions = read("mme", path)
    assert [(q.id, q.kind, q.group, q.answers) for q in questions] == [
        ("count/1-1", "count", "count/1", ("yes",)),
        ("count/1-2", "count", "count/1", ("no",)),
    ]
    upload = format_of("mme").upload(questions, ["Yes", "No\nit is"], Source(path))
    cells = [line.split("\t") for line in upload["/count.txt"].decode().splitlines()]
    assert [(row[0], *row[2:]) for row in cells] == [("1", "Yes", "Yes"), ("1", "No", "No it is")]


def test_scienceqa_of_llava_asks_its_prompts_by_its_rule(tmp_path):
    turns = [{"from": "human", "value": "<image>\nContext: N/A\nQuestion: Which?"},
             {"from": "gpt", "value": "The answer is B."}]  # fmt: skip
    records = [{"id": "5", "image": "5/image.png", "conversations": turns},
               {"id": "6", "conversations": turns}]  # fmt: skip
    path = write(tmp_path / "llava_test_CQM-A.json", records)
    write(tmp_path / "problems.json", {"5": {"subject": "social science"}})
    images(tmp_path / "images" / "test", "5/image.png")
    (question,) = read("scienceqa", path)
    assert question.text == "Context: N/A\nQuestion: Which?" + LETTER
    assert (question.answers, question.kind) == (("B",), "social science")
    assert question.record == {"question_id": "5", "prompt": "<image>\n" + question.text}
    score = format_of("scienceqa").score
    assert [score(question, text) for text in ("B", "B. x", "The answer is B.", "B.")] == [
        1,
        1,
        1,
        0,
    ]


COLUMNS = (
    "index question hint A B C D answer category image source l2-category comment split".split()
)


def test_mmbench_rows_are_asked_once_counted_in_circles_and_uploaded(tmp_path):
    picture = base64.b64encode(png()).decode()
    rows = [
        ["7", "Which?", "nan", "red", "blue", "", "", "A", "c", picture, "s", "colour", "", "dev"],
        ["1000007", "Which?", "", "blue", "red", "", "", "B", "c", "7", "s", "colour", "", "dev"],
        ["8", "What?", "Look.", "a<b", "2", "3", "", "C", "c", "7", "s", "colour", "", "dev"],
    ]
    path = tmp_path / "mmbench_dev_20230712.tsv"
    path.write_text("\n".join("\t".join(row) for row in [COLUMNS, *rows]) + "\n")
    questions = read("mmbench-rows", path)
    assert [(q.id, q.group, q.answers) for q in questions] == [
        ("7", "7", ("A",)), ("1000007", "7", ("B",)), ("8", "8", ("C",)),
    ]  # fmt: skip
    assert questions[2].text == "Look.\nWhat?\nA. a<b\nB. 2\nC. 3" + LETTER
    assert questions[2].record == {
        "question_id": 8, "round_id": 0, "prompt": "Look.\nWhat?\nA. a<b\nB. 2\nC. 3",
        "options": ["a<b", "2", "3"], "option_char": ["A", "B", "C"],
    }  # fmt: skip
    format = format_of("mmbench-rows")
    assert format.group_score([1.0, 0.0]) == 0
    upload = format.upload(questions[:2], ["A", "B & <b>\x00"], Source(path))
    assert cells_of(upload[".xlsx"]) == [
        ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"],
        ["7", "Which?", "red", "blue", "", "", "A", "A", "dev"],
        ["1000007", "Which?", "blue", "red", "", "", "B & <b>", "B", "dev"],
        ["8", "What?", "a<b", "2", "3", "", "", "C", "dev"],
    ]
    chinese = tmp_path / "mmbench_dev_cn_20231003.tsv"
    chinese.write_text(path.read_text())
    assert read("mmbench-rows", chinese)[0].text.endswith("B. blue\n请直接回答选项字母。")
    test = tmp_path / "mmbench_test.tsv"
    test.write_text(path.read_text().replace("answer", "unknown", 1))
    assert not format.is_scored(read("mmbench-rows", test))


def cells_of(content: bytes) -> list[list[str]]:
    """The cells of a spreadsheet, read by its format's own rules."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
    return [["".join(cell.itertext()) for cell in row] for row in sheet.iter(f"{{{MAIN}}}row")]


def test_a_spreadsheet_repeats_byte_by_byte():
    rows = [[1, "é & <x>"], [2, ""]]
    assert spreadsheet(["a", "b"], rows) == spreadsheet(["a", "b"], rows)
    assert cells_of(spreadsheet(["a", "b"], rows)) == [["a", "b"], ["1", "é & <x>"], ["2", ""]]


def test_skip_bad_leaves_out_prepared_lines_without_their_annotation(tmp_path):
    path = lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", "a?", "b?")
    images(tmp_path, "a.jpg")
    write(tmp_path / "testdev_balanced_questions.json", {"1": {"answer": "x"}})
    bad = BadRecords(skip=True)
    assert [q.id for q in read("gqa", path, bad)] == ["1"]
    assert "has no question 0" in bad.messages[0]
