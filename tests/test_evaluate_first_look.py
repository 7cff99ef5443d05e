"""What `evaluate` asks by default, and where the result goes."""

import json
from types import SimpleNamespace

import pytest

from mlx_vlm_prune import evaluate, load
from mlx_vlm_prune.evaluate import build_parser, main
from mlx_vlm_prune.evaluation import first_look
from mlx_vlm_prune.evaluation.budgeted_methods import default_methods
from mlx_vlm_prune.evaluation.question_options import question_set_of
from mlx_vlm_prune.evaluation.result_file import default_result_path
from mlx_vlm_prune.pruners import METHODS

from . import test_evaluate
from .test_evaluate import COUNT, command, refused, run

_cache, home = test_evaluate._cache, test_evaluate.home  # fixtures
K = ("--keep-tokens", "12")
NORM = ("norm",)


def question_count(*argv: str) -> int:
    """How many questions a command line asks."""
    return len(question_set_of(build_parser().parse_args(argv)).load()[0])


def test_without_options_few_questions_and_methods_are_asked_and_with_all_all(
    home, tmp_path, capsys
):
    rows = test_evaluate.rows_of(home)
    path = tmp_path / "q.jsonl"
    for row in rows:
        row["image"] = str(home / row["image"])
    path.write_text("\n".join(json.dumps(rows[n % COUNT] | {"id": n}) for n in range(70)) + "\n")
    questions = ("--questions", str(path))
    assert question_count(*questions) == first_look.QUESTIONS == 60
    assert (question_count(*questions, "--all"), question_count(*questions, "--limit", "65")) == (
        70,
        65,
    )
    assert question_count(*questions, "--all", "--limit", "3") == 3
    per_kind = first_look.PER_KIND
    assert (
        question_count(),
        question_count("--per-kind", "1"),
        question_count("--limit", "200"),
    ) == (6 * per_kind, 6, 200)
    args = build_parser().parse_args(questions)
    question_set = question_set_of(args)
    assert first_look.left_out(args, question_set, 60) == ["questions", "methods"]
    args.pruner = ["norm"]
    assert first_look.left_out(args, question_set, 60) == ["questions"]
    assert first_look.left_out(args, question_set, 70) == []


def test_the_default_methods_are_a_few_with_the_learned_ones():
    model, _ = load()
    supported = default_methods(model)
    few = first_look.methods_of(SimpleNamespace(pruner=None, all=False), supported, model.learned)
    assert {*few} == {*first_look.METHODS, *model.learned}
    every = first_look.methods_of(SimpleNamespace(pruner=None, all=True), supported, {})
    assert every == supported and len(every) > 3 * len(few)
    assert {name.removesuffix("+restore") for name in first_look.METHODS} <= METHODS.keys()
    chosen = first_look.methods_of(SimpleNamespace(pruner=["norm"], all=True), supported, {})
    assert chosen == ["norm"]


def test_a_first_look_is_called_so(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first_look, "QUESTIONS", 5)
    result = run(home, tmp_path / "a.json", *K, specs=NORM)
    assert (result["count"], result["part"]) == (5, ["questions"])
    assert "A first look: --all asks all questions." in capsys.readouterr().out
    result = run(home, tmp_path / "b.json", *K, "--all", specs=NORM)
    assert result["count"] == COUNT and "part" not in result
    assert "first look" not in capsys.readouterr().out


def test_the_file_is_named_after_model_and_questions(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = command(home, "x", *K, specs=NORM)
    del argv[argv.index("--out") : argv.index("--out") + 2]
    main(argv)
    assert json.loads((tmp_path / "evaluation-mlx-questions.json").read_text())["count"] == COUNT
    assert str(default_result_path(None, "scenes")) == "evaluation-scenes-scenes.json"
    name = default_result_path("owner/A model-4bit", "a/b (1).tsv").name
    assert name == "evaluation-A_model-4bit-b_1_.json"


def test_a_result_of_another_model_or_set_or_of_more_questions_is_not_replaced(
    home, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "e.json"
    run(home, out, *K, specs=NORM)
    kept = out.read_text()
    monkeypatch.setattr(evaluate, "load", None)  # refused before the model is read
    other = command(home, out, *K, specs=NORM)[2:]
    scenes = ["--questions", "scenes", "--per-kind", "9"]
    assert f"{out} is of {home / 'mlx'}; name another file with --out" in refused(capsys, other)
    model = ["--model", str(home / "mlx"), "--out", str(out)]
    assert f"{out} is of other questions, " in refused(capsys, [*model, *scenes])
    fewer = command(home, out, "--limit", "4", *K, specs=NORM)
    assert f"{out} has {COUNT} questions, and this run 4; name" in refused(capsys, fewer)
    assert out.read_text() == kept
    for text in ("my thesis", "{}", '{"command": "sweep", "rows": []}', '{"rows": 3, "count": 1}'):
        out.write_text(text)
        assert f"{out} is no result of evaluate; name another" in refused(capsys, other)
        assert out.read_text() == text
    assert not (tmp_path / ".e.json.lock").exists()


def test_a_result_is_replaced_by_one_of_as_many_questions_or_more(home, tmp_path):
    out = tmp_path / "e.json"
    run(home, out, "--limit", "4", *K, specs=NORM)
    assert run(home, out, *K, specs=NORM)["count"] == COUNT
    again = run(home, out, *K, specs=("uniform",))
    assert [row["pruner"] for row in again["rows"]] == ["none", "random", "uniform"]


def test_a_result_of_other_methods_is_replaced_only_where_out_names_it(
    home, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    path, budgets = tmp_path / "evaluation-mlx-questions.json", ("--keep-tokens", "5")

    def unnamed(*more: str, specs: tuple[str, ...] = NORM) -> list[str]:
        argv = command(home, "x", *more, specs=specs)
        del argv[argv.index("--out") : argv.index("--out") + 2]
        return argv

    main(unnamed(*K))
    kept = path.read_text()
    others = {
        "random with 12 tokens": unnamed(*budgets),
        "norm with 12 tokens": unnamed(*K, specs=("uniform",)),
        "random with 12 tokens ": unnamed(*K, "--positions", "keep"),
    }
    for part, argv in others.items():
        line = refused(capsys, argv)
        assert (
            f"has {part.strip()}, which this run does not ask; name another file with --out" in line
        )
        assert path.read_text() == kept
    main(unnamed(*K, *budgets, specs=("norm", "uniform")))  # those of before are in it
    assert len(json.loads(path.read_text())["rows"]) == 7
    main([*unnamed(*K), "--out", str(path)])
    assert len(json.loads(path.read_text())["rows"]) == 3


def test_methods_that_are_one_and_the_same_choice_are_named(home, tmp_path, capsys):
    """The tiny tower has a CLS token; up to 25 tokens hiprune has no anchor."""
    specs = ("hiprune", "norm", "received_attention")
    budgets = ("--keep-tokens", "12", "--keep-tokens", "5", "--keep-ratio", "1")
    result = run(home, tmp_path / "e.json", *budgets, specs=specs)
    assert result["alike"] == [{"pruners": ["hiprune", "received_attention"], "tokens": [12, 5]}]
    line = "One and the same choice: hiprune and received_attention (12, 5)."
    assert line in capsys.readouterr().out
    assert "alike" not in run(home, tmp_path / "f.json", *budgets, specs=("norm", "uniform"))


def test_without_a_cls_token_cls_attention_is_received_attention(tmp_path, capsys):
    host_folders = pytest.importorskip("tests.host_folders", reason="mlx-vlm is not installed")
    host_folders.checkpoint("smolvlm", tmp_path)  # a SigLIP
    host_folders.picture(tmp_path, "a.png", 56, 56)
    row = {"id": "1", "image": "a.png", "question": "w7 w9", "answer": "w3"}
    (tmp_path / "q.jsonl").write_text(json.dumps(row))
    main(["--model", str(tmp_path / "smolvlm"), "--questions", str(tmp_path / "q.jsonl"),
          "--pruner", "cls_attention", "--pruner", "received_attention", "--keep-ratio", "0.5",
          "--max-tokens", "2", "--out", str(tmp_path / "e.json")])  # fmt: skip
    assert "One and the same choice: cls_attention and received_attention (10)" in (
        capsys.readouterr().out
    )


def test_drawn_questions_hide_no_path_and_are_asked_of_models_that_know_their_words(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)

    def error_of(*argv: str) -> str:
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*argv, "--pruner", "norm", "--keep-tokens", "49"])
        assert stop.value.code == 2
        return capsys.readouterr().err

    assert "the built-in model knows no word of pages" in error_of("--questions", "pages")
    (tmp_path / "q.jsonl").write_text("")
    assert "pages is drawn" in error_of("--questions", "q.jsonl", "--format", "pages")
    (tmp_path / "pages").mkdir()
    assert "write ./pages for the path" in error_of("--questions", "pages")
