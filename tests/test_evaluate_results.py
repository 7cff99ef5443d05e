"""What an evaluation's result holds beside counts: texts, times to the first token, drafts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from convert.__main__ import main as convert
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.advise import load_evaluation
from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.evaluation import first_token, result
from mlx_vlm_prune.evaluation.answers import prepare_question
from mlx_vlm_prune.evaluation.questions import json_lines, pages
from mlx_vlm_prune.evaluation.questions.scenes import read_drawn

from . import llava, test_evaluate, tiny
from .test_evaluate import COUNT, ROW_KEYS, command, refused, run, without_times

_cache, home = test_evaluate._cache, test_evaluate.home  # fixtures


def test_texts_are_the_questions_the_right_answers_and_what_generate_says(home, tmp_path):
    evaluation = run(home, tmp_path / "e.json", "--keep-tokens", "12")
    texts, questions = evaluation["texts"], test_evaluate.rows_of(home)
    assert len(texts) == COUNT
    for each, question in zip(texts, questions, strict=True):
        assert (each["id"], each["question"]) == (question["id"], question["question"])
        assert (each["image"], each["answers"]) == (question["image"], [question["answer"].strip()])
        assert len(each["responses"]) == len(evaluation["rows"])
    model, processor = load(home / "mlx")
    for p, row in enumerate(evaluation["rows"]):
        n = p % COUNT
        answer = generate(
            model, processor, questions[n]["question"], home / questions[n]["image"],
            pruner=row["pruner"], keep_tokens=row["tokens"], max_tokens=test_evaluate.MAX_TOKENS,
        )  # fmt: skip
        assert texts[n]["responses"][p] == answer.text, row["pruner"]


def test_texts_are_kept_as_far_as_they_are_few_or_as_the_user_says(home, tmp_path, monkeypatch):
    options = ("--keep-tokens", "12")
    kept = run(home, tmp_path / "e.json", *options)
    with monkeypatch.context() as patched:
        patched.setattr(result, "MOST_RESPONSES", COUNT * len(kept["rows"]) - 1)
        left_out = run(home, tmp_path / "e.json", *options)
        assert run(home, tmp_path / "e.json", *options, "--texts")["texts"] == kept["texts"]
    assert "texts" not in left_out
    expected = {name: value for name, value in kept.items() if name != "texts"}
    assert without_times(left_out) == without_times(expected)
    assert "texts" not in run(home, tmp_path / "e.json", *options, "--no-texts")
    assert load_evaluation(None, tmp_path / "e.json")["rows"] == kept["rows"]


def test_pictures_without_a_file_have_a_digest_or_the_name_of_their_scene(tmp_path):
    question = next(read_drawn(1))
    assert result.image_name(question.image) == f"scene {question.id.split('-')[0]}"
    assert result.image_name(b"\x01\xff") == "sha256:01ff"
    assert result.more_images(question) == {}
    two = replace(question, more_images=(Path("a/b.png"), b"\x02"))
    assert result.more_images(two) == {"more_images": ["b.png", "sha256:02"]}
    main(["--per-kind", "1", "--pruner", "norm", "--keep-tokens", "98", "--out",
          str(tmp_path / "e.json")])  # fmt: skip
    texts = json.loads((tmp_path / "e.json").read_text())["texts"]
    assert [text["image"] for text in texts] == [f"scene {t['id'].split('-')[0]}" for t in texts]
    page = next(pages.read_drawn(1))
    assert result.image_name(page.image) == f"page {page.id.split('-')[0]}"
    assert result.image_name(lambda: None) is None  # drawn by someone's own format


# --- the time to the first token ------------------------------------------------------


def test_first_tokens_have_a_column_and_their_parts(home, tmp_path, capsys):
    evaluation = run(home, tmp_path / "e.json", "--keep-tokens", "12", "--first-token", "2")
    for row in evaluation["rows"]:
        assert row.keys() - {"to_random"} == ROW_KEYS | {"first_token_ms"}
        times = row["first_token_ms"]
        assert times.keys() == {"image", "vision", "pruner", "prefill", "total", "p10", "p90"}
        assert 0 < times["vision"] < times["total"] and times["p10"] <= times["p90"]
    titles, *lines = capsys.readouterr().out.splitlines()
    assert titles.endswith("first, ms") and any("single requests" in line for line in lines)


def test_methods_take_turns_and_the_first_question_warms_up(home, tmp_path, monkeypatch):
    """A clock that says how many requests came before."""
    requests = []

    def counted(model, processor, request):
        requests.append(request)
        return {"image": 1.0, "vision": None, "total": float(len(requests))}

    monkeypatch.setattr(first_token, "first_token_times", counted)
    specs = ("norm", "tome")
    evaluation = run(home, tmp_path / "e.json", "--keep-tokens", "12", "--first-token", "3",
                     specs=specs)  # fmt: skip
    order = [request.pruner.spec for request in requests]
    turns = ["none", "random", "norm", "tome"]
    assert order == [turns[(i + n) % 4] for n in range(4) for i in range(4)]
    assert [request.keep_tokens for request in requests[:4]] == [16, 12, 12, 12]
    assert [request.prompt for request in requests[::4]] == [
        test_evaluate.TEXTS[n] for n in (0, 0, 1, 2)
    ]
    totals = [row["first_token_ms"]["total"] for row in evaluation["rows"]]
    assert totals == [11, 12, 9, 10]  # none has 8, 11 and 14, random 5, 12 and 15
    assert evaluation["rows"][0]["first_token_ms"] == {
        "image": 1, "total": 11, "p10": 8, "p90": 14,
    }  # fmt: skip


@pytest.mark.parametrize("flags", [(), ("--num-draft-tokens", "3")], ids=["plain", "drafts"])
def test_questions_about_several_pictures_are_timed_with_all_of_them(
    home, tmp_path, monkeypatch, flags
):
    """The authors' run of LLaVA asks so about MMMU; here a format of ours yields such questions."""
    model = tiny.checkpoint(tiny.taught(tiny.reference(), noise=0.02), tmp_path)
    requests, read = [], json_lines.read

    def several(source, bad):
        for n, question in enumerate(read(source, bad)):
            more = (home / "1.png",) * (n % 3)
            yield replace(question, more_images=more)

    def counted(model, processor, request):
        requests.append(request)
        return {"image": 1.0, "total": 1.0}

    monkeypatch.setattr(json_lines, "read", several)
    monkeypatch.setattr(first_token, "first_token_times", counted)
    argv = command(home, tmp_path / "e.json", "--keep-tokens", "12", "--first-token", "3", *flags,
                   specs=("norm",))  # fmt: skip
    argv[argv.index("--model") + 1] = str(model)
    main(argv)
    images = [len(request.images) for request in requests]
    assert images == [n for n in (1, 1, 2, 3) for _ in range(3)]
    assert {request.num_draft_tokens for request in requests} == {3 if flags else None}
    texts = json.loads((tmp_path / "e.json").read_text())["texts"]
    assert [text.get("more_images", []) for text in texts[:3]] == [[], ["1.png"], ["1.png"] * 2]


def test_an_interrupt_while_times_are_measured_keeps_the_answers(
    home, tmp_path, monkeypatch, capsys
):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    options = ("--keep-tokens", "12", "--first-token", "1")
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        patched.setattr(first_token, "first_token_times", interrupted)
        main(command(home, tmp_path / "e.json", *options))
    assert stop.value.code == 130 and not (tmp_path / "e.json").exists()
    assert f"interrupted after {COUNT * 6} of {COUNT * 6} answers" in capsys.readouterr().err
    run(home, tmp_path / "e.json", *options)
    assert f"going on after {COUNT * 6} of {COUNT * 6} answers" in capsys.readouterr().err


# --- drafts ---------------------------------------------------------------------------


def compare_drafts(folder, argv: list[str], *specs: str) -> list[dict]:
    """The rows with drafts, whose answers are those without."""
    chosen = [part for spec in specs for part in ("--pruner", spec)]
    results = []
    for more in ([], ["--num-draft-tokens", "5"]):
        main([*argv, *chosen, *more, "--out", str(folder / "e.json")])
        results.append(json.loads((folder / "e.json").read_text()))
    plain, drafted = results
    assert drafted["num_draft_tokens"] == 5 and drafted["texts"] == plain["texts"]
    for row, other in zip(drafted["rows"], plain["rows"], strict=True):
        assert row["logprob"] == pytest.approx(other["logprob"], abs=2e-3)
        for name in ("pruner", "tokens", "accuracy", "overall", "loyalty"):
            assert row[name] == other[name], (row["pruner"], name)
    return drafted["rows"]


def test_drafts_change_no_answer_of_the_built_in_model(tmp_path, capsys):
    argv = ["--per-kind", "1", "--keep-tokens", "98"]
    rows = compare_drafts(tmp_path, argv, "twig", "tome")
    model, processor = load()
    for row in (rows[0], rows[2]):
        assert row["pruner"] in ("none", "twig")
        answers = [
            generate(model, processor, question.text, question.image(), num_draft_tokens=5,
                     pruner=row["pruner"], keep_tokens=row["tokens"])
            for question in read_drawn(1)
        ]  # fmt: skip
        drafted, accepted = sum(a.drafted for a in answers), sum(a.accepted for a in answers)
        drafts = row["drafts"]
        assert (drafts["drafted"], drafts["accepted"]) == (drafted, accepted) and drafted > 0
        assert drafts["accepted_share"] == pytest.approx(accepted / drafted, abs=1e-4)
        assert drafts["tokens_per_second"] > 0
    titles = capsys.readouterr().out.splitlines()
    assert any("accepted" in line and "tokens/s" in line for line in titles)


def test_drafts_change_no_answer_of_a_random_model_and_can_be_timed(tmp_path, home):
    model = tiny.checkpoint(tiny.taught(tiny.reference(), noise=0.02), tmp_path)
    argv = ["--model", str(model), "--questions", str(home / "questions.jsonl"), "--batch", "4",
            "--max-tokens", "12", "--keep-tokens", "12"]  # fmt: skip
    rows = compare_drafts(tmp_path, argv, "norm", "fastv", "avgpool", "twig")
    assert all(row["drafts"]["drafted"] > 0 for row in rows)
    main([*argv, "--pruner", "norm", "--num-draft-tokens", "2", "--first-token", "1",
          "--out", str(tmp_path / "e.json")])  # fmt: skip
    (row, *_) = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert row["first_token_ms"]["total"] > 0 and "drafts" in row


def test_an_interrupted_run_with_drafts_goes_on_with_its_figures(
    home, tmp_path, monkeypatch, capsys
):
    model = tiny.checkpoint(tiny.taught(tiny.reference(), noise=0.02), tmp_path)
    broken = shutil.copytree(home, tmp_path / "copy")
    shutil.rmtree(broken / "mlx")
    shutil.copytree(model, broken / "mlx")
    options = ("--keep-tokens", "12", "--num-draft-tokens", "3")
    straight = run(broken, tmp_path / "straight.json", *options)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("mlx_vlm_prune.evaluation.drafting.prepare_question", interrupt_at(6))
        main(command(broken, tmp_path / "e.json", *options))
    resumed = run(broken, tmp_path / "e.json", *options)
    assert "going on after 24 of 66" in capsys.readouterr().err
    assert [draft_counts(row) for row in resumed["rows"]] == [
        draft_counts(row) for row in straight["rows"]
    ]
    run(broken, tmp_path / "e.json", "--keep-tokens", "12")  # is another run
    assert "going on" not in capsys.readouterr().err


def interrupt_at(call: int):
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return prepare_question(*arguments)

    return interrupted


def draft_counts(row: dict) -> dict:
    return {name: x for name, x in row["drafts"].items() if name != "tokens_per_second"}


def test_a_llava_with_a_published_twig_is_evaluated_with_drafts(tmp_path, home):
    """The twig is LLaVA's own upper layers, norm and output layer, so it is always right."""
    source = llava.write(llava.random_model(), tmp_path / "llava")
    twig = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        name = name.removeprefix("language_model.")
        if name.startswith(("model.layers.1.", "model.layers.2.")):
            twig[name.replace("rs.1.", "rs.0.", 1).replace("rs.2.", "rs.1.", 1)] = tensor
        elif name in ("model.norm.weight", "lm_head.weight"):
            twig[name] = tensor
    save_file(twig, tmp_path / "twig.safetensors")
    flags = ["--twig", str(tmp_path / "twig.safetensors"), "--twig-layer", "1"]
    convert(["to-mlx", str(source), str(tmp_path / "mlx"), *flags])
    argv = ["--model", str(tmp_path / "mlx"), "--dtype", "float32", "--keep-tokens", "9",
            "--questions", str(home / "questions.jsonl"), "--max-tokens", "8",
            "--limit", "3"]  # fmt: skip
    rows = compare_drafts(tmp_path, argv, "twig")
    assert rows[0]["drafts"]["accepted_share"] == 1


REFUSED = {
    "none": (["--num-draft-tokens", "0"], "--num-draft-tokens is 0; it must be at least 1"),
    "no twig": (["--num-draft-tokens", "5"], "needs a twig, and"),
    "first token": (["--first-token", "0"], "--first-token is 0; it must be at least 1"),
    "json": (["--json", "a.json"], "--json is for --merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_flag_is_refused_in_one_sentence(home, tmp_path, capsys, monkeypatch, case):
    flags, part = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, command(home, tmp_path / "e.json", *flags))


# --- large pictures -------------------------------------------------------------------


def test_larger_pictures_are_read_where_max_pixels_allows_them(home, tmp_path, capsys):
    """Pictures of 70 x 70 pixels; PNG cannot be decoded at a fraction of its size."""
    options = ("--keep-tokens", "12", "--first-token", "1")
    line = refused(capsys, command(home, tmp_path / "e.json", *options, "--max-pixels", "4899"))
    assert "has more than the 0.004899 megapixels allowed; --max-pixels allows more" in line
    allowed = run(home, tmp_path / "e.json", *options, "--max-pixels", "4900")
    assert allowed["max_pixels"] == 4900
    plain = run(home, tmp_path / "e.json", *options)
    assert "max_pixels" not in plain and plain["texts"] == allowed["texts"]
    line = refused(capsys, command(home, tmp_path / "e.json", "--max-pixels", "0"))
    assert "--max-pixels is 0; it must be a whole number from 1" in line
