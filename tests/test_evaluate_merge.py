"""`evaluate --merge`: TwigVLM's average relative percentage, and what does not belong together."""

import json

import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.evaluation.merging import merge
from mlx_vlm_prune.scenes import compose

from .test_evaluate import refused


def row(pruner: str, overall: float, tokens: int = 98, **more) -> dict:
    return {"pruner": pruner, "tokens": tokens, "of": 196, "overall": overall, **more}


def evaluation(folder, name: str, rows: list[dict], **more):
    """A result in FOLDER/NAME.json, of which merging reads no other keys."""
    content = {"questions": f"{name}.jsonl", "format": name, "model": "m", "unit": "%",
               "count": 100, "rows": rows} | more  # fmt: skip
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def files(tmp_path):
    """Accuracy and MME's sum, by hand: 75 % and 90 % make 82.5 %, 50 % and 60 % make 55 %."""
    gqa = [row("none", 0.8, 196), row("random", 0.4), row("norm", 0.6), row("tome", 0.7)]
    mme = [row("none", 1500.0, 196), row("norm", 1350.0), row("random", 900.0)]
    return [
        evaluation(tmp_path, "gqa", gqa),
        evaluation(tmp_path, "mme", mme, unit="", model_key="abc"),
    ]


def test_the_average_relative_percentage_by_hand(files, tmp_path, capsys):
    out = tmp_path / "rel.json"
    main(["--merge", *map(str, files), "--json", str(out)])
    merged = json.loads(out.read_text())
    assert {"machine", "versions", "model"} <= merged.keys()
    assert [(one["pruner"], one["rel"]) for one in merged["rows"]] == [
        ("none", 100), ("random", 55), ("norm", 82.5),
    ]  # fmt: skip
    assert merged["rows"][2]["relative"] == {"gqa": 75, "mme": 90}
    assert merged["sets"][1] == {
        "name": "mme", "file": str(files[1]), "full": 1500, "questions": "mme.jsonl",
        "format": "mme", "count": 100, "unit": "",
    }  # fmt: skip
    assert merged["left_out"] == [{"method": "tome (98)", "missing": [str(files[1])]}]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["pruner", "budget", "gqa", "mme", "Rel."]
    assert lines[2].split() == ["none", "all", "80.0", "1500.0", "100.0"]
    assert [line.split() for line in lines[4:6]] == [
        ["norm", "98", "60.0", "1350.0", "82.5"], ["random", "98", "40.0", "900.0", "55.0"],
    ]  # fmt: skip
    assert f"Left out: tome (98) is not in {files[1]}" in lines
    assert lines[-1] == f"Wrote {out}"


def test_budgets_are_told_apart_and_shares_are_one_whatever_tokens_they_are(tmp_path):
    def rows(full: float, tokens: int) -> list[dict]:
        return [
            row("none", full, 2 * tokens),
            row("norm", 0.5, tokens, keep_ratio=0.5),
            row("norm", 0.4, 9, keep_ratio=0.25, positions="keep"),
            row("norm", 0.3, 7, keep_tokens=8),
        ]

    a, b = (
        evaluation(tmp_path, "a", rows(0.5, 30)),
        evaluation(tmp_path, "b", rows(1.0, 77), format="a"),
    )
    merged = merge([a, b])
    assert [one["name"] for one in merged["sets"]] == ["a", "b"]  # of one format: by their files
    assert [(one["budget"], one.get("positions"), one["rel"]) for one in merged["rows"]] == [
        (None, None, 100), (0.5, None, 75), (0.25, "keep", 60), (8, None, 45),
    ]  # fmt: skip
    assert merge([a])["rows"][1]["rel"] == 100


def broken(folder, name: str, **more):
    content = json.loads((folder / "gqa.json").read_text()) | {"questions": "x", "format": "x"}
    return evaluation(folder, name, content.pop("rows"), **(content | more))


REFUSALS = {
    "another model": ({"model": "n"}, "gqa.json is of m, and {file} of n"),
    "adapters": ({"adapter_path": "a"}, "of m with a; an average is of one model"),
    "the same set": ({"questions": "gqa.jsonl", "format": "gqa"}, "are both of gqa.jsonl"),
    "full is wrong": ({"rows": [row("none", 0.0, 196)]}, "so nothing can be given in percent"),
    "other methods": (
        {"rows": [row("none", 1.0, 196), row("random", 0.3), row("norm", 0.3, 49)]},
        "no method is in every file with the same budget: {gqa} has norm (98), tome (98);"
        " {file} has norm (49)",
    ),
    "not scored": (
        {"rows": [{"pruner": "none", "tokens": 196, "of": 196, "loyalty": 1.0}]},
        "{file}: its answers were not scored",
    ),
    "no full": ({"rows": [row("norm", 0.3)]}, "is no evaluation"),
    "no rows": ({"rows": 3}, "is no evaluation"),
    "no figure": ({"rows": [row("none", None, 196)]}, "is no evaluation"),
}  # fmt: skip


def test_a_sweep_is_told_from_an_evaluation_without_figures(files, tmp_path, capsys):
    sweep = tmp_path / "sweep.json"
    sweep.write_text(json.dumps({"command": "sweep", "rows": [{"pruner": "none", "tokens": 196}]}))
    assert "sweep.json is no evaluation" in refused(capsys, ["--merge", files[0], sweep])


@pytest.mark.parametrize("case", REFUSALS)
def test_what_does_not_belong_together_is_refused_in_a_sentence(files, tmp_path, capsys, case):
    change, part = REFUSALS[case]
    rows = change.get("rows")
    file = broken(tmp_path, "other", **{k: v for k, v in change.items() if k != "rows"})
    if rows is not None:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rows": rows}))
    line = refused(capsys, ["--merge", files[0], file, "--json", tmp_path / "rel.json"])
    assert part.format(file=file, gqa=files[0]) in line
    assert not (tmp_path / "rel.json").exists()


def test_the_weights_tell_models_apart_where_both_files_know_them(files, tmp_path):
    a = broken(tmp_path, "a", model_key="abc", model="another/path")
    assert merge([files[1], a])["rows"][-1]["pruner"] in ("norm", "random")
    with pytest.raises(UserError, match="of one model"):
        merge([files[1], broken(tmp_path, "a", model_key="xyz", model="m")])


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"rows": [3]}'])
def test_a_file_that_is_no_evaluation_is_refused(files, tmp_path, capsys, text):
    (tmp_path / "x.json").write_text(text)
    assert "x.json" in refused(capsys, ["--merge", files[0], tmp_path / "x.json"])


def test_a_missing_file_is_refused(files, tmp_path, capsys):
    assert "nowhere.json" in refused(capsys, ["--merge", files[0], tmp_path / "nowhere.json"])


def test_results_of_evaluate_are_merged(tmp_path, monkeypatch, capsys):
    """Scenes, and the model on a file of its own; an older result has no key of the weights."""
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    compose(1).image().save(tmp_path / "a.png")
    question = {"image": "a.png", "question": "What does the sign say?", "answer": "x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(question))
    options = ["--pruner", "norm", "--keep-ratio", "0.5"]
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    main(["--per-kind", "1", *options, "--out", str(a)])
    main(["--questions", str(tmp_path / "q.jsonl"), *options, "--out", str(b)])
    answer = json.loads(b.read_text())["texts"][0]["responses"][0]
    (tmp_path / "q.jsonl").write_text(json.dumps(question | {"answer": answer}))
    main(["--questions", str(tmp_path / "q.jsonl"), *options, "--out", str(b)])
    old = json.loads(a.read_text())
    for name in ("model_key", "texts"):
        old.pop(name)
    a.write_text(json.dumps(old))
    merged = merge([a, b])
    assert [one["name"] for one in merged["sets"]] == ["scenes", "own"]
    assert merged["sets"][1]["full"] == 1
