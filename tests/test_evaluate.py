"""`python -m mlx_vlm_prune.evaluate`: its result repeats, an interrupted run is resumed, and every
refusal is one sentence."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import generate, load
from mlx_vlm_prune.evaluate import main
from mlx_vlm_prune.evaluation import bootstrap
from mlx_vlm_prune.evaluation.answers import prepare_question
from mlx_vlm_prune.machine.user_cache import model_key

from . import generations, tiny
from .test_generations import converted

TIMES = ("seconds", "machine", "date")
KEYS = {
    "questions", "format", "model", "model_key", "count", "kinds", "unit", "seed", "max_tokens",
    "majority", "machine", "versions", "seconds", "megabytes", "rows", "refused", "skipped",
    "texts", "question_set", "date", "command",
}  # fmt: skip
ROW_KEYS = {
    "pruner", "tokens", "of", "accuracy", "overall", "loyalty", "logprob", "to_full", "right",
}  # fmt: skip
SPECS = ("norm", "tome", "fastv", "avgpool")
TEXTS = ("Is there a red star?", "What does the sign say?", "Where is the star?")
COUNT, MAX_TOKENS = 11, 3


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model (`mlx`), and eleven questions of two kinds about four pictures.

    The right answers of kind a are the model's own, so that some are right.
    """
    folder = tmp_path_factory.mktemp("home")
    model, processor = load(tiny.checkpoint(tiny.reference(), folder))
    rng = np.random.default_rng(0)
    for n in range(4):
        pixels = rng.integers(0, 255, (70, 70, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    rows = []
    for n in range(COUNT):
        image, text = f"{n % 4}.png", TEXTS[n % 3]
        answer = generate(model, processor, text, image=folder / image, max_tokens=MAX_TOKENS).text
        is_a = n % 2 and answer.strip()
        kind, right = ("a", answer) if is_a else ("b", "yes" if n % 3 else "no")
        rows.append(
            {"id": f"q{n}", "image": image, "question": text, "kind": kind, "answer": right}
        )
    write(folder, rows)
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bootstrap, "FEWEST", 1)  # the few questions here are enough


def write(folder, rows) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def rows_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def command(home, out, *more: str, specs=SPECS) -> list[str]:
    chosen = [part for spec in specs for part in ("--pruner", spec)]
    return [
        "--model", str(home / "mlx"), "--questions", str(home / "questions.jsonl"), "--out",
        str(out), "--batch", "4", "--max-tokens", str(MAX_TOKENS), *chosen, *more,
    ]  # fmt: skip


def run(home, out, *more: str, **options) -> dict:
    main(command(home, out, *more, **options))
    return json.loads(out.read_text(encoding="utf-8"))


def refused(capsys, argv) -> str:
    """The one sentence of a command that must fail with code 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(one) for one in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error:" in line]
    return line


def without_times(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in TIMES}


def interrupt(monkeypatch, at: int) -> None:
    """Ctrl-C while the `at`-th question is prepared."""
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return prepare_question(*arguments)

    monkeypatch.setattr("mlx_vlm_prune.evaluation.answers.prepare_question", interrupted)


def test_the_result_has_every_key_and_figure(home, tmp_path, capsys):
    result = run(home, tmp_path / "e.json", "--keep-tokens", "12", "--keep-tokens", "5")
    assert result.keys() == KEYS
    assert (result["count"], sum(result["kinds"].values())) == (COUNT, COUNT)
    assert (tmp_path / "e.json").read_text().startswith('{\n    "command": "evaluate"')
    pairs = [(row["pruner"], row["tokens"]) for row in result["rows"]]
    assert pairs[:2] == [("none", tiny.N), ("random", 12)] and ("fastv", 5) not in pairs
    assert [(refusal["pruner"], refusal["tokens"]) for refusal in result["refused"]] == [
        ("fastv", 5)
    ]
    for row in result["rows"]:
        compared = set() if row["pruner"] in ("none", "random") else {"to_random"}
        assert row.keys() == ROW_KEYS | compared
        figures = {"overall", "loyalty", "logprob", *result["kinds"]}
        assert all(row[name].keys() == figures for name in {"to_full", *compared})
        assert all(low <= x <= high for x, low, high in row["to_full"].values())
        assert row["of"] == tiny.N and row["logprob"] < 0
    out = capsys.readouterr().out
    assert f"Wrote {tmp_path / 'e.json'}" in out and "Not asked: fastv with 5 tokens" in out


def test_full_is_loyal_to_itself_and_right_where_the_right_answers_are_its_own(home, tmp_path):
    full = run(home, tmp_path / "e.json", "--keep-tokens", "12")["rows"][0]
    assert full["loyalty"] == 1 and full["to_full"]["loyalty"] == [0, 0, 0]
    assert full["accuracy"]["a"] == 1


def test_two_runs_give_the_same_but_for_times(home, tmp_path):
    first, second = (run(home, tmp_path / name, "--keep-tokens", "12") for name in ("a", "b"))
    assert without_times(first) == without_times(second)
    third = run(home, tmp_path / "c", "--keep-tokens", "12", "--seed", "1")
    bounds = [[row["to_full"]["logprob"] for row in result["rows"]] for result in (first, third)]
    assert bounds[0] != bounds[1]


@pytest.mark.parametrize("budget", [("--keep-ratio", "1"), ("--keep-tokens", "17")], ids=str)
def test_with_all_tokens_every_method_has_fulls_figures(home, tmp_path, budget):
    result = run(home, tmp_path / "e.json", *budget)
    full, *others = result["rows"]
    assert len(others) == 1 + len(SPECS)
    for row in others:
        for key in ("accuracy", "overall", "loyalty", "logprob", "to_full", "right"):
            assert row[key] == full[key], (row["pruner"], key)
    assert full["to_full"]["logprob"] == [0, 0, 0]


@pytest.mark.parametrize("at", [1, 6, COUNT])
def test_an_interrupted_run_is_resumed_and_ends_in_the_same_table(
    home, tmp_path, monkeypatch, capsys, at
):
    budgets, done = ("--keep-tokens", "12", "--keep-tokens", "5"), (at - 1) // 4 * 4
    straight = run(home, tmp_path / "straight.json", *budgets)
    answers = done * len(straight["rows"])
    table = capsys.readouterr().out
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stop:
        interrupt(patched, at)
        main(command(home, tmp_path / "e.json", *budgets))
    assert stop.value.code == 130
    assert not (tmp_path / "e.json").exists()
    total = COUNT * len(without_times(straight)["rows"]) + COUNT  # fastv fails with 5 tokens
    message = f"interrupted after {answers} of {total} answers; the same command goes on"
    assert message in capsys.readouterr().err
    assert without_times(run(home, tmp_path / "e.json", *budgets)) == without_times(straight)
    again = capsys.readouterr()
    assert again.out == table.replace("straight.json", "e.json")
    assert (f"going on after {answers} of {total} answers" in again.err) == (done > 0)
    assert not list(tmp_path.glob("*.part.jsonl"))


def test_a_line_that_was_cut_off_is_asked_again(home, tmp_path, monkeypatch):
    straight = run(home, tmp_path / "straight.json", "--keep-tokens", "12")
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        interrupt(patched, 10)
        main(command(home, tmp_path / "e.json", "--keep-tokens", "12"))
    (part,) = tmp_path.glob("e.*.part.jsonl")
    part.write_bytes(part.read_bytes()[:-20])
    assert without_times(run(home, tmp_path / "e.json", "--keep-tokens", "12")) == without_times(
        straight
    )


def test_a_run_is_resumed_only_with_the_same_questions_and_options(
    home, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        interrupt(patched, 10)
        main(command(home, tmp_path / "e.json", "--keep-tokens", "12"))
    for other in (("--keep-tokens", "12", "--limit", "5"), ("--keep-tokens", "5")):
        run(home, tmp_path / "e.json", *other)
        assert "going on" not in capsys.readouterr().err
    assert len(list(tmp_path.glob("e.*.part.jsonl"))) == 1
    run(home, tmp_path / "e.json", "--keep-tokens", "12")
    assert "going on" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["image", "line"])
def test_a_bad_question_is_an_error_or_with_skip_bad_named_and_left_out(
    home, tmp_path, capsys, fault
):
    broken = shutil.copytree(home, tmp_path / "broken")
    complete = run(broken, tmp_path / "complete.json", "--keep-tokens", "12")
    rows = rows_of(home)
    if fault == "image":
        (broken / "cut.png").write_bytes((home / "0.png").read_bytes()[:400])
        rows[4]["image"], name = "cut.png", "cut.png"
    else:
        rows[4], name = '{"image": "0.png", "question"', "questions.jsonl, line 5"
    write(broken, rows)
    out = tmp_path / "e.json"
    assert name in refused(capsys, command(broken, out, "--keep-tokens", "12"))
    result = run(broken, out, "--keep-tokens", "12", "--skip-bad")
    captured = capsys.readouterr()
    is_resumed = "going on after 24 of" in captured.err  # four questions, six methods
    assert is_resumed == (fault == "image"), "the answers before the damaged image count"
    assert (
        result["count"] == COUNT - 1
        and len(result["skipped"]) == 1
        and name in result["skipped"][0]
    )
    for row, before in zip(result["rows"], complete["rows"], strict=True):
        bits, bits_before = (bin(int("1" + r["right"], 16))[3:] for r in (row, before))
        assert bits[: COUNT - 1] == bits_before[:4] + bits_before[5:COUNT], (
            "only the bad question is lost"
        )


def test_where_a_question_is_missing_its_group_is_left_out(home, tmp_path, capsys):
    """MME scores two questions about an image together."""
    task = tmp_path / "mme" / "count"
    task.mkdir(parents=True)
    for n in range(3):
        shutil.copy(home / f"{n}.png", task)
        (task / f"{n}.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    (task / "1.png").write_bytes(b"no picture")
    argv = command(home, tmp_path / "e.json", "--keep-tokens", "12", "--format", "mme")
    argv[argv.index("--questions") + 1] = str(tmp_path / "mme")
    assert "1.png" in refused(capsys, argv)
    main([*argv, "--skip-bad", "--batch", "1"])
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["count"] == 4 and result["unit"] == "" and len(result["skipped"]) == 3
    assert result["skipped"][-1] == "group count/1: a question of it is missing"


def test_where_no_question_is_left_there_is_no_result(home, tmp_path, capsys):
    broken = shutil.copytree(home, tmp_path / "broken")
    for n in range(4):
        (broken / f"{n}.png").write_bytes(b"no picture")
    argv = command(broken, tmp_path / "e.json", "--keep-tokens", "12", "--skip-bad")
    assert "could be asked" in refused(capsys, argv)
    write(broken, ["{}"])
    assert "holds no question" in refused(capsys, argv)
    assert not (tmp_path / "e.json").exists()


BAD_FLAGS = {
    "no such file": (["--questions", "absent.jsonl"], "absent.jsonl"),
    "format": (["--format", "popo"], "did you mean pope"),
    "unknown pruner": (["--pruner", "nrom"], "did you mean norm"),
    "learned without weights": (["--pruner", "attention_pool"], "holds no weights"),
    "ratio": (["--keep-ratio", "1.5"], "above 0 and at most 1"),
    "ratio nan": (["--keep-ratio", "nan"], "above 0 and at most 1"),
    "tokens": (["--keep-tokens", "0"], "at least 1"),
    "batch": (["--batch", "0"], "--batch"),
    "limit": (["--limit", "0"], "--limit"),
    "max-tokens": (["--max-tokens", "-1"], "--max-tokens"),
    "seed": (["--seed", "-1"], "--seed"),
    "out": (["--out", "absent/e.json"], "no folder"),
    "out is a folder": (["--out", "."], "a folder"),
    "per-kind": (["--per-kind", "3"], "for drawn questions"),
    "model": (["--model", "nowhere"], "nowhere"),
    "dtype": (["--dtype", "float8"], "float16"),
    "images": (["--questions", "scenes", "--split", "val"], "for a file's questions"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_wrong_flag_is_refused_in_one_sentence(home, tmp_path, capsys, monkeypatch, case):
    flags, part = BAD_FLAGS[case]
    monkeypatch.chdir(tmp_path)
    assert part in refused(capsys, command(home, tmp_path / "e.json", *flags))
    assert not list(tmp_path.glob("*.json*"))


def test_a_method_that_a_model_does_not_support_is_listed_as_refused(home, tmp_path, capsys):
    """Behind one of MiniMind-3V's towers four patches become one token: none may leave before."""
    release = generations.release("minimind-3v-2026-04-19", False)
    model = converted(release, tmp_path)
    argv = command(home, tmp_path / "e.json", "--keep-ratio", "0.5", specs=("tome", "norm"))
    argv[1] = str(model)
    main(argv)
    result = json.loads((tmp_path / "e.json").read_text())
    assert [row["pruner"] for row in result["rows"]] == ["none", "random", "norm"]
    (refusal,) = result["refused"]
    assert refusal["pruner"] == "tome" and "inside the tower" in refusal["why"]
    assert "Not asked: tome with" in capsys.readouterr().out


def test_a_kind_with_the_name_of_a_figure_is_refused_at_once(home, tmp_path, capsys):
    broken = shutil.copytree(home, tmp_path / "broken")
    write(broken, [rows_of(home)[0] | {"kind": "overall"}])
    assert "overall" in refused(capsys, command(broken, tmp_path / "e.json"))


def test_a_cache_that_cannot_be_written_fails_no_run(home, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_VLM_PRUNE_CACHE", str(tmp_path / "file"))
    assert run(home, tmp_path / "e.json", "--keep-tokens", "12")["count"] == COUNT


def test_a_models_key_is_its_contents(home, tmp_path):
    copied = shutil.copytree(home / "mlx", tmp_path / "copy")
    assert model_key(copied) == model_key(home / "mlx")
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_key(copied) != model_key(home / "mlx")
    shutil.copy(home / "mlx" / "model.safetensors", copied)
    (copied / "config.json").write_text("{}")
    assert model_key(copied) != model_key(home / "mlx")


def test_scenes_are_asked_of_the_built_in_model(tmp_path, capsys):
    argv = ["--per-kind", "2", "--pruner", "divprune", "--keep-ratio", "0.5", "--out"]
    main([*argv, str(tmp_path / "e.json")])
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["count"] == 12 and set(result["kinds"].values()) == {2}
    assert [(row["pruner"], row["tokens"]) for row in result["rows"]] == [
        ("none", 196), ("random", 98), ("divprune", 98),
    ]  # fmt: skip
    assert result["rows"][0]["overall"] > 0.8 and result["model"] == "scenes"
