"""`evaluate` on published sets, end to end: joined answers, unscored sets, a judge, files."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mlx_vlm_prune import plot
from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.evaluation.questions import FORMATS, PREPARED

from . import tiny
from .judge_server import completion, judge_server
from .test_evaluate import refused
from .test_questions import images, write

KEYS = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.checkpoint(tiny.reference(), tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def command(model, questions, out, *more: str, format: str = "llava-eval") -> list[str]:
    return [
        "--model", str(model), "--questions", str(questions), "--format", format, "--out", str(out),
        "--max-tokens", "4", "--pruner", "norm", "--keep-tokens", "5", *more,
    ]  # fmt: skip


def run(*arguments, **options) -> dict:
    argv = command(*arguments, **options)
    main(argv)
    return json.loads(Path(argv[7]).read_text(encoding="utf-8"))


def answers(folder, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def vqav2(folder) -> Path:
    images(folder / "test2015", "a.jpg")
    rows = [{"question_id": 10 + n, "image": "a.jpg", "text": f"What {n}?{SHORT}",
             "category": "default"} for n in range(5)]  # fmt: skip
    return write(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)


def test_a_set_without_answers_is_asked_and_its_answers_written_for_the_server(
    model, tmp_path, capsys
):
    path, out = vqav2(tmp_path), tmp_path / "e.json"
    result = run(model, path, out, "--batch", "2")
    assert result["format"] == "vqav2" and result["majority"] == {}
    for row in result["rows"]:
        compared = {"to_random"} if row["pruner"] == "norm" else set()
        assert row.keys() == {"pruner", "tokens", "of", "loyalty", "to_full"} | compared
        assert row["to_full"].keys() == {"loyalty"}
    assert result["answers"] == str(tmp_path / "e-answers")
    folder = tmp_path / "e-answers"
    names = sorted(file.stem for file in folder.glob("*.jsonl"))
    assert names == [f"none-{tiny.N}", "norm-5", "random-5"]
    lines = answers(folder, "norm-5")
    assert [line["question_id"] for line in lines] == [10, 11, 12, 13, 14]
    assert all(line.keys() == KEYS and line["metadata"] == {} for line in lines)
    assert len({line["answer_id"] for line in lines}) == 5
    assert {line["model_id"] for line in lines} == {f"{model.name}-norm-5"}
    assert lines[0]["prompt"] == "What 0?" + SHORT
    upload = json.loads((folder / "upload" / "norm-5.json").read_text())
    assert [entry["question_id"] for entry in upload] == [10, 11, 12, 13, 14]
    printed = capsys.readouterr().out
    assert "Not scored: the files of answers are for" in printed and str(folder) in printed
    assert not (tmp_path / "cache" / "evaluations").exists(), "advise learns nothing from it"
    before = (folder / "norm-5.jsonl").read_bytes()
    run(model, path, out)
    assert (folder / "norm-5.jsonl").read_bytes() == before, "the same run gives the same files"


def pope(folder) -> Path:
    images(folder / "val2014", "a.jpg")
    texts = [f"Is there a {thing}?" for thing in ("dog", "cat", "car", "tree")]
    rows = [{"question_id": n, "image": "a.jpg", "text": text + SHORT, "category": "random"}
            for n, text in enumerate(texts)]  # fmt: skip
    labels = [{"image": "a.jpg", "text": text, "label": "yes"} for text in texts]
    file = write(folder / "coco" / "coco_pope_random.jsonl", labels)
    file.rename(file.with_suffix(".json"))
    return write(folder / "llava_pope_test.jsonl", rows)


def test_a_set_with_its_annotations_is_scored_and_its_answers_written_on_demand(model, tmp_path):
    path, folder = pope(tmp_path), tmp_path / "written"
    result = run(model, path, tmp_path / "e.json")
    assert "answers" not in result and not (tmp_path / "e-answers").exists()
    full = result["rows"][0]
    assert full["overall"] == 1.0 and full["more"]["share of yes"] == 100, "no is never said"
    again = run(model, path, tmp_path / "e.json", "--answers", str(folder))
    assert again["rows"] == result["rows"] and again["answers"] == str(folder)
    assert [line["question_id"] for line in answers(folder, "norm-5")] == [0, 1, 2, 3]
    assert not (folder / "upload").exists()


def mm_vet(folder) -> Path:
    abilities = [["ocr"], ["ocr", "math"], ["rec"]]
    data = {f"v1_{n}": {"imagename": "a.jpg", "question": f"What {n}?", "answer": "red<OR>blue",
                        "capability": named} for n, named in enumerate(abilities)}  # fmt: skip
    images(folder / "images", "a.jpg")
    write(folder / "mm-vet.json", data)
    return folder


def test_mmvet_without_a_judge_is_written_in_its_evaluators_layout(model, tmp_path):
    result = run(model, mm_vet(tmp_path), tmp_path / "e.json", format="mmvet")
    row = result["rows"][0]
    assert "overall" not in row and "accuracy" not in row and row["logprob"] < 0
    written = json.loads((tmp_path / "e-answers" / "upload" / "norm-5.json").read_text())
    assert list(written) == ["v1_0", "v1_1", "v1_2"]


def test_mmvet_is_graded_by_the_judge_of_the_command_line(model, tmp_path, capsys):
    """The judge likes questions 1 and 2; an unreachable one ends the run, which is resumed."""

    def reply(body):
        is_first = "What 0? | red <OR> blue | " in body["messages"][0]["content"]
        return completion("0.0" if is_first else "0.6")

    questions, out = mm_vet(tmp_path), tmp_path / "e.json"
    with judge_server(reply) as (url, requests):
        chosen = ("--judge-model", "grader", "--judge-url")
        dead = command(model, questions, out, *chosen, "http://127.0.0.1:9/v1", format="mmvet")
        assert "does not answer" in refused(capsys, dead)
        result = run(model, questions, out, *chosen, url, format="mmvet")
        assert "going on after 3 of 9 answers" in capsys.readouterr().err
        count = len(requests)
        run(model, questions, out, *chosen, url, format="mmvet")
        assert len(requests) == count, "grades are kept"
    full = result["rows"][0]
    assert full["overall"] == 0.4 and full["accuracy"] == {"ocr": 0, "math_ocr": 0.6, "rec": 0.6}
    assert full["more"] == {"ocr": 30.0, "math": 60.0, "rec": 60.0}
    assert result["judge"] == "grader" and result["majority"] == {}


def test_the_command_of_the_page_on_questions_runs(model, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "questions.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```\n(.*?)```", page, re.S)
    program, name, *argv = shlex.split(block.replace("\\\n", ""))
    assert (program, name) == ("mlx-vlm-prune", "evaluate")
    mm_vet(tmp_path / "mm-vet")
    monkeypatch.chdir(tmp_path)
    with judge_server(lambda body: completion("1.0")) as (url, requests):
        argv[argv.index("--judge-url") + 1] = url
        main([*argv, "--model", str(model), "--pruner", "norm", "--keep-tokens", "5"])
    assert requests[0]["model"] == "my-judge"
    result = tmp_path / f"evaluation-{model.name}-mm-vet.json"
    assert json.loads(result.read_text())["rows"][0]["overall"] == 1


def test_the_page_on_questions_names_every_format():
    page = (Path(__file__).parents[1] / "docs" / "questions.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w[\w-]*)` \|", page, re.M)
    assert sorted(named) == sorted(FORMATS)
    assert all(beginning in page.lower() for beginning in PREPARED)


def test_wrong_scoring_options_are_refused_in_one_sentence(model, tmp_path, capsys):
    path, out = vqav2(tmp_path), tmp_path / "e.json"
    url = ("--judge-url", "http://127.0.0.1:1/v1", "--judge-model", "grader")
    cases = {
        "go together": command(model, path, out, *url[:2]),
        "--judge-url is for mmvet; vqav2 has": command(model, path, out, *url),
        "is like http": command(model, path, out, "--judge-url", "x", *url[2:], format="mmvet"),
        "is a file": command(model, path, out, "--answers", str(path)),
        "no folder": command(model, path, out, "--answers", str(tmp_path / "a" / "b")),
        "scenes has": ["--judge-url", "http://127.0.0.1:1", "--judge-model", "grader"],
    }
    for part, argv in cases.items():
        assert part in refused(capsys, argv), part
    assert not out.exists()


def test_an_unscored_result_is_neither_merged_nor_drawn(model, tmp_path, capsys):
    out = tmp_path / "e.json"
    run(model, vqav2(tmp_path), out)
    for command_main, argv in (
        (main, ["--merge", str(out), str(out)]),
        (plot.main, [str(out), "--out", str(tmp_path / "figures")]),
    ):
        with pytest.raises(SystemExit) as stop:
            command_main(argv)
        (line,) = [one for one in capsys.readouterr().err.splitlines() if "error:" in one]
        assert stop.value.code == 2 and "its answers were not scored, so there is no" in line
        assert "UserError" not in line
