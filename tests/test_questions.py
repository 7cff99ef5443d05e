"""Question formats: what is read from small files, and what is refused."""

import importlib
import io
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation import questions as questions_package
from mlx_vlm_prune.evaluation.questions import DRAWN, FORMATS, BadRecords, Source, format_of
from mlx_vlm_prune.evaluation.questions.scenes import KINDS, read_drawn


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, "PNG")
    return file.getvalue()


def read(name: str, path: Path, bad: BadRecords | None = None, **options):
    return list(format_of(name).read(Source(path, **options), bad or BadRecords()))


def write(path: Path, content: object) -> Path:
    """A file of JSON, or of JSON lines where there is a list and the name ends in l."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        rows = [row if isinstance(row, str) else json.dumps(row) for row in content]
        path.write_text("\n".join(rows) + "\n")
    else:
        path.write_text(json.dumps(content))
    return path


def images(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png())
    return folder


def test_every_format_reads_and_scores_without_mlx():
    code = "import sys; from mlx_vlm_prune.evaluation.questions import FORMATS, format_of\n"
    code += "for name in FORMATS: assert callable(format_of(name).module.score)\n"
    code += "assert 'mlx.core' not in sys.modules and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_file_that_reads_and_scores_questions_is_a_format():
    names = [module.name for module in pkgutil.iter_modules(questions_package.__path__)]
    modules = [importlib.import_module(f"{questions_package.__name__}.{name}") for name in names]
    formats = {m.__name__.rpartition(".")[2] for m in modules if hasattr(m, "score")}
    assert formats == set(FORMATS.values())


def test_an_unknown_format_names_similar_ones_and_all():
    with pytest.raises(UserError, match=r"'texvqa'; did you mean textvqa\? there are own, scenes"):
        format_of("texvqa")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in DRAWN])
def test_a_missing_file_or_folder_is_refused_before_the_first_question(name, tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        format_of(name).read(Source(tmp_path / "nowhere" / "it"), BadRecords(skip=True))


@pytest.mark.parametrize("name", ["own", "llava", "pope", "textvqa", "gqa"])
def test_a_missing_folder_of_images_is_refused_before_the_first_question(name, tmp_path):
    path = write(tmp_path / "q.json", {"data": []} if name in ("textvqa", "gqa") else [])
    with pytest.raises(UserError, match=r"no folder .*apart"):
        format_of(name).read(Source(path, images=tmp_path / "apart"), BadRecords(skip=True))


def test_scenes_ask_each_kind_equally_often_and_draw_when_called():
    questions = list(read_drawn(3))
    assert sorted(q.kind for q in questions) == sorted(KINDS * 3)
    assert len({q.id for q in questions}) == len(questions)
    assert questions[0].image().size == (224, 224)
    assert format_of("scenes").score(questions[0], questions[0].answers[0].upper() + ".") == 1


def test_own_questions_come_from_a_file_or_its_folder(tmp_path):
    images(tmp_path, "a.png", "b/b.png")
    lines = [
        {"image": "a.png", "question": "What?", "answer": "red"},
        {"image": "b/b.png", "question": "Q", "answer": ["x", "y"], "kind": "k", "id": 7},
    ]
    path = write(tmp_path / "questions.jsonl", [lines[0], "", lines[1]])
    first, second = read("own", tmp_path)
    assert read("own", path) == [first, second]
    assert (first.id, first.text, first.answers, first.kind) == ("1", "What?", ("red",), "all")
    assert (second.id, second.answers, second.kind) == ("7", ("x", "y"), "k")
    assert second.image == tmp_path / "b" / "b.png"


BROKEN = {
    "{": "not valid JSON",
    "[1]": "not a JSON object",
    "[" * 100_000: "nested too deeply",
    '{"image": "a.png", "question": "Q"}': "there is no answer",
    '{"image": "a.png", "question": 3, "answer": "x"}': "question is a number, not a text",
    '{"image": "a.png", "question": " ", "answer": "x"}': "question is empty",
    '{"image": "a.png", "question": "Q", "answer": []}': "answer is empty",
    '{"image": "a.png", "question": "Q", "answer": ["x", 1]}': "answer is not a list of texts",
    '{"image": "no.png", "question": "Q", "answer": "x"}': "there is no image file",
    '{"image": "a\\u0000", "question": "Q", "answer": "x"}': "not the name of an image file",
    '{"image": "%s", "question": "Q", "answer": "x"}' % ("a" * 999): "not the name of an image",
    '{"image": "a.png", "question": "Q", "answer": "x", "id": "1"}': "another question has this id",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_an_error_or_with_skip_listed_and_left_out(line, tmp_path):
    good = {"image": "a.png", "question": "Q", "answer": "x", "id": "1"}
    path = write(images(tmp_path, "a.png") / "my.jsonl", [good, line, {**good, "id": "3"}])
    where = "question 1" if "another" in BROKEN[line] else "line 2"
    with pytest.raises(UserError, match=f"{where}: .*{BROKEN[line]}.*skip_bad") as refused:
        read("own", path)
    assert "\n" not in str(refused.value)
    bad = BadRecords(skip=True)
    assert [q.id for q in read("own", path, bad)] == ["1", "3"]
    assert len(bad.messages) == 1
    assert where in bad.messages[0]
    assert where == "question 1" or "my.jsonl" in bad.messages[0]


def test_a_line_that_is_not_text_is_the_only_bad_record(tmp_path):
    path = write(images(tmp_path, "a.png") / "my.jsonl", [])
    good = b'{"image": "a.png", "question": "\xc3\xa9?", "answer": "x"}\n'
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\xff\xfe\n")
    bad = BadRecords(skip=True)
    assert [q.text for q in read("own", path, bad)] == ["é?"]
    assert "line 2" in bad.messages[0]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_random_bytes_are_bad_records_and_no_traceback(tmp_path, rows):
    path = tmp_path / "any.jsonl"
    path.write_bytes(b"\n".join(rows))
    bad = BadRecords(skip=True)
    assert read("own", path, bad) == read("pope", path, bad) == []


def test_llava_conversations_become_single_questions(tmp_path):
    def turn(who, value):
        return {"from": who, "value": value}

    first, second = turn("human", "<image>\nWhat?"), turn("gpt", "A cat.")
    records = [
        {"id": "x", "image": "a.png", "conversations": [first, second]},
        {"id": "text", "conversations": [turn("human", "Hello"), turn("gpt", "Hi")]},
        {"image": "a.png", "conversations": [first, second, turn("human", "Why?"), second]},
    ]
    path = write(images(tmp_path, "a.png") / "l.json", records)
    questions = read("llava", path)
    assert [(q.id, q.text, q.answers) for q in questions] == [
        ("x", "What?", ("A cat.",)),
        ("3-1", "What?", ("A cat.",)),
        ("3-2", "Why?", ("A cat.",)),
    ]
    for faulty in ([first], [second, first], [turn("human", "<image>"), second], "text", []):
        bad = BadRecords(skip=True)
        write(path, [{"image": "a.png", "conversations": faulty}, *records])
        good = read("llava", path, BadRecords(skip=True))
        assert read("llava", path, bad) == questions[:1] + good[1:]
        assert "l.json, record 1" in bad.messages[0]


def test_minimind_rows_without_an_image_mark_are_left_out(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads parquet files")
    import pyarrow.parquet as parquet

    def talk(*words):
        roles = ("user", "assistant") * len(words)
        return json.dumps([{"role": r, "content": w} for r, w in zip(roles, words, strict=False)])

    rows = [talk("<image>\nWhat?", "A cat."), talk("Hello", "Hi"), talk("<image>", "x"), "<image>{"]
    table = {"conversations": rows, "image_bytes": [png()] * 4}
    path = tmp_path / "m.parquet"
    parquet.write_table(pyarrow.table(table), path)
    bad = BadRecords(skip=True)
    (question,) = read("minimind", path, bad)
    assert (question.text, question.answers, question.image) == ("What?", ("A cat.",), png())
    assert [where.split(":")[0].split()[-1] for where in bad.messages] == ["3", "4"]
    lists = [[png()], [png()], [png(), png()], []]
    listed = {"conversations": [rows[0]] * 4, "image_bytes": lists}
    parquet.write_table(pyarrow.table(listed), path)
    bad = BadRecords(skip=True)
    assert [q.id for q in read("minimind", path, bad)] == ["1", "2"]
    assert "2 images" in bad.messages[0]
    parquet.write_table(pyarrow.table({"conversations": rows}), path)
    with pytest.raises(UserError, match="no column image_bytes"):
        read("minimind", path)
    path.write_bytes(b"PAR1 but no more")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read("minimind", path)


def test_without_pyarrow_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "m.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"pip install 'mlx-vlm-prune\[parquet\]'"):
        read("minimind", tmp_path / "m.parquet")


def test_pope_files_of_a_folder_are_kinds(tmp_path):
    line = {"question_id": 1, "image": "a.png", "text": "Is there a dog?", "label": "no"}
    images(tmp_path / "val2014", "a.png")
    for kind in ("random", "popular"):
        (tmp_path / f"coco_pope_{kind}.json").write_text(json.dumps(line))
    questions = read("pope", tmp_path, images=tmp_path / "val2014")
    assert [(q.id, q.kind, q.answers) for q in questions] == [
        ("popular-1", "popular", ("no",)),
        ("random-1", "random", ("no",)),
    ]
    assert questions[0].text.endswith("?\nAnswer the question using a single word or phrase.")
    path = write(tmp_path / "q.jsonl", [{**line, "label": "maybe"}])
    with pytest.raises(UserError, match=r"q\.jsonl, line 1: label is 'maybe'; it is yes or no"):
        read("pope", path, images=tmp_path / "val2014")


def test_textvqa_puts_the_most_frequent_answer_first(tmp_path):
    record = {"question_id": 5, "image_id": "a", "question": "What does it say?"}
    record["answers"] = ["x", "stop", "stop", *"yyy", "q", "r", "s", "t"]
    path = write(images(tmp_path, "a.jpg") / "t.json", {"data": [record]})
    (question,) = read("textvqa", path)
    assert question.answers[:2] == ("y", "stop")
    assert format_of("textvqa").score(question, "Stop!") == pytest.approx(0.6)
    write(path, {"data": [{**record, "answers": ["x"] * 9}]})
    with pytest.raises(UserError, match=r"record 1: there are 9 answers; the rule needs 10"):
        read("textvqa", path)
    write(path, {"questions": []})
    with pytest.raises(UserError, match="list called data"):
        read("textvqa", path)


def test_gqa_questions_have_their_structure_as_kind(tmp_path):
    record = {"question": "Is it red?", "imageId": "12", "answer": "yes"}
    record["types"] = {"structural": "verify", "semantic": "attr"}
    path = write(images(tmp_path, "12.jpg") / "g.json", {"q1": record, "q2": {"question": "?"}})
    (question,) = read("gqa", path, bad := BadRecords(skip=True))
    assert (question.id, question.kind, question.answers) == ("q1", "verify", ("yes",))
    assert "g.json, question q2" in bad.messages[0]
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read("gqa", path)
