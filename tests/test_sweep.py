"""Promises of `sweep`: fair turns, every figure, an interrupted run resumed, a sentence for each
mistake before anything runs."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import generate, load, sweep
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation.sweep_images import readable_images
from mlx_vlm_prune.evaluation.sweep_run import Measurement
from mlx_vlm_prune.planning.operations import count
from mlx_vlm_prune.pruners import plan

from . import generations, llava, tiny
from .test_generations import converted

KEYS = {
    "command", "model", "model_key", "prompt", "images", "runs", "warmup", "share", "max_tokens",
    "dtype", "machine", "versions", "operations_cover", "rows", "refused", "skipped",
}  # fmt: skip
ROW_KEYS = {
    "pruner", "tokens", "of", "kept", "images", "runs", "ms", "tokens_per_second", "peak_gb",
    "generation_tokens", "prompt_tokens", "cache_bytes", "cache_saved", "operations",
    "operations_saved", "agreement", "answers",
}  # fmt: skip
PARTS = {"image", "vision", "pruner", "prefill", "first_token", "total"}
PROMPT = "Is there a red star?"
CASES = ["--pruner", "norm", "tome", "fastv", "--keep-tokens", "12", "5"]


def write_picture(path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (70, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny model (`mlx`) and a folder of two pictures (`photos`)."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.checkpoint(tiny.reference(), folder)
    (folder / "photos").mkdir()
    for n in range(2):
        write_picture(folder / "photos" / f"{n}.png", n)
    return folder


def command(home, out, *more: str, image="photos") -> list[str]:
    return [
        "--model", str(home / "mlx"), "--image", str(home / image), "--prompt", PROMPT,
        "--json", str(out), "--max-tokens", "4", "--runs", "2", *(more or CASES),
    ]  # fmt: skip


def run(home, out, *more: str, **options) -> dict:
    sweep.main(command(home, out, *more, **options))
    return json.loads(out.read_text(encoding="utf-8"))


def refused(capsys, argv) -> str:
    """The one sentence of a command that must fail with code 2."""
    with pytest.raises(SystemExit) as stop:
        sweep.main([str(one) for one in argv])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and "Traceback" not in err
    (line,) = [line for line in err.splitlines() if "error:" in line]
    return line


def calls_of(monkeypatch, interrupt_at: int = 0) -> list[tuple[str, str]]:
    """The image and the method of every answer from here on, the latest with Ctrl-C."""
    calls = []

    def logged(*arguments, image, pruner, **options):
        calls.append((image.stem, pruner.spec))
        if len(calls) == interrupt_at:
            raise KeyboardInterrupt
        return generate(*arguments, image=image, pruner=pruner, **options)

    monkeypatch.setattr(sweep, "generate", logged)
    return calls


@pytest.fixture(scope="module")
def swept(home, tmp_path_factory):
    return run(home, tmp_path_factory.mktemp("out") / "r.json")


def test_the_result_has_every_key_and_figure(swept):
    assert swept.keys() == KEYS
    pairs = [(row["pruner"], row["tokens"]) for row in swept["rows"]]
    budgets = [(name, K) for K in (12, 5) for name in ("norm", "tome", "fastv")]
    assert pairs == [("none", tiny.N), *(pair for pair in budgets if pair != ("fastv", 5))]
    for row in swept["rows"]:
        assert row.keys() == ROW_KEYS | ({"gain"} if row["pruner"] != "none" else set())
        assert row["ms"].keys() == PARTS and row["images"] == 2
        for spread in row["ms"].values():
            assert 0 <= spread["p10"] <= spread["median"] <= spread["p90"]
        assert row["ms"]["first_token"]["median"] < row["ms"]["total"]["median"]
    assert [row["runs"] for row in swept["rows"][1:]] == [4] * 5  # two images, two rounds
    assert swept["rows"][0]["runs"] == 8  # before every four of five


def test_answers_tokens_and_cache_are_those_of_generate(home, swept):
    model, processor = load(home / "mlx")
    for row in swept["rows"]:
        for n, answer in enumerate(row["answers"]):
            alone = generate(
                model, processor, PROMPT, home / "photos" / f"{n}.png", pruner=row["pruner"],
                keep_tokens=row["tokens"], max_tokens=4,
            )  # fmt: skip
            assert answer["text"] == alone.text
            assert answer["kept"] == alone.visual_tokens_kept
            assert row["cache_bytes"] == alone.cache_bytes


def test_images_that_have_fewer_tokens_than_asked_for_keep_all(home, tmp_path):
    more = ["--pruner", "norm", "--keep-tokens", "17", "99"]
    _, pruned = run(home, tmp_path / "r.json", *more)["rows"]
    assert (pruned["tokens"], pruned["kept"]) == (tiny.N, tiny.N)
    assert pruned["agreement"] == {"same": 1.0, "overlap": 1.0}


def test_operations_are_those_of_the_count_and_savings_their_ratios(home, swept):
    model, processor = load(home / "mlx")
    text = generate(model, processor, PROMPT, home / "photos/0.png").prompt_tokens - tiny.N
    full = swept["rows"][0]
    for row in swept["rows"]:
        counted = count(model.config, text, plan(row["pruner"]), row["tokens"])
        assert row["operations"]["first_token"] == counted.first_token
        assert row["operations"]["vision"] == counted.vision
        saved = 1 - counted.first_token / full["operations"]["first_token"]
        assert row["operations_saved"] == pytest.approx(saved)
        assert row["cache_saved"] == pytest.approx(1 - row["cache_bytes"] / full["cache_bytes"])
        if row is not full:
            assert row["gain"]["first_token"]["predicted"] == pytest.approx(1 / (1 - saved))
    assert full["operations_saved"] == full["cache_saved"] == 0
    assert full["agreement"] == {"same": 1.0, "overlap": 1.0}


def test_agreement_is_that_of_a_count_by_hand():
    def answer(ids):
        return Measurement({}, None, "", ids, 0, 0, 0, [], 0, 0.0)

    full = answer([5, 5, 7, 9])
    assert answer([5, 5, 7, 9]).agreement(full) == {"same": 1.0, "overlap": 1.0}
    # 5 once, 9 once: two of three and four
    assert answer([9, 5, 1]).agreement(full) == {"same": 0.0, "overlap": 2 * 2 / 7}
    assert answer([1]).agreement(full)["overlap"] == 0
    assert answer([]).agreement(answer([])) == {"same": 1.0, "overlap": 1.0}


def test_full_and_pruned_take_turns_in_every_round(home, tmp_path, monkeypatch):
    calls = calls_of(monkeypatch)
    run(home, tmp_path / "r.json", "--pruner", "norm", "uniform", "--keep-ratio", "0.5", "0.25",
        "--share", "2", "--warmup", "0")  # fmt: skip
    round_ = ["none", "norm", "uniform", "none", "norm", "uniform"]
    assert calls == [(image, spec) for image in "01" for spec in round_ * 2]


def test_an_interrupted_sweep_goes_on_where_it_was(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.json"
    calls = calls_of(monkeypatch, interrupt_at=38)  # in the second round about the second image
    with pytest.raises(SystemExit) as stop:
        run(home, out)
    assert stop.value.code == 130 and not out.exists()
    assert "3 of 4 rounds are measured; the same command goes on" in capsys.readouterr().err
    (part,) = tmp_path.glob("r.*.part.jsonl")
    assert len(part.read_text().splitlines()) == 3
    monkeypatch.undo()
    calls = calls_of(monkeypatch)
    result = run(home, out)
    assert {image for image, _ in calls} == {"1"} and len(calls) == 2 * 7  # one round is warm-up
    assert [row["runs"] for row in result["rows"]] == [8, 4, 4, 4, 4, 4]
    assert not part.exists() and "going on: 3 of 4 rounds" in capsys.readouterr().err


def test_a_part_of_another_sweep_is_left_alone(home, tmp_path, monkeypatch):
    calls_of(monkeypatch, interrupt_at=16)
    with pytest.raises(SystemExit):
        run(home, tmp_path / "r.json")
    monkeypatch.undo()
    run(home, tmp_path / "r.json", "--pruner", "norm", "--keep-tokens", "8")
    assert len([*tmp_path.glob("r.*.part.jsonl")]) == 1


def test_the_table_tells_of_every_case_and_of_what_was_refused(home, tmp_path, capsys):
    write_picture(tmp_path / "a.png", 3)
    more = ["--pruner", "norm", "mlp", "fastv", "--keep-tokens", "5", "4"]
    result = run(home, tmp_path / "r.json", *more, image=tmp_path / "a.png")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert re.split(r"  +", lines[0])[:4] == ["pruner", "tokens", "first token", "gain"]
    assert [line.split()[:2] for line in lines[2:7] if line] == [
        ["none", "16"], ["norm", "5"], ["norm", "4"],
    ]  # fmt: skip
    assert "Refused: mlp: mlp is learned" in out.replace("mlp: is learned", "mlp: mlp is learned")
    assert {(r["pruner"], r.get("tokens")) for r in result["refused"]} == {
        ("mlp", None), ("fastv", 5), ("fastv", 4),
    }  # fmt: skip
    assert f"Answers to {PROMPT!r}:" in out and f"Wrote {tmp_path / 'r.json'}" in out


def test_larger_images_are_read_where_max_pixels_allows_them(home, tmp_path, capsys):
    """A JPEG with more is decoded at a fraction; other formats, and more still, are refused."""
    Image.new("RGB", (90, 80), "red").save(tmp_path / "a.png")
    argv = ["--model", str(home / "mlx"), "--image", str(tmp_path / "a.png"), "--prompt", PROMPT,
            "--pruner", "norm", "--keep-tokens", "5", "--runs", "1", "--warmup", "0",
            "--max-tokens", "1", "--json", str(tmp_path / "r.json")]  # fmt: skip
    line = refused(capsys, [*argv, "--max-pixels", "7199"])
    assert "has more than the 0.007199 megapixels allowed; --max-pixels allows more" in line
    sweep.main([*argv, "--max-pixels", "7200"])
    assert json.loads((tmp_path / "r.json").read_text())["rows"]
    capsys.readouterr()
    assert "--max-pixels is 0; " in refused(capsys, [*argv, "--max-pixels", "0"])


MISTAKES = [
    (["--pruner", "nrm"], "argument --pruner: no pruner is called 'nrm'; did you mean norm"),
    (["--pruner", "norm", "none"], "--pruner none is what all are measured beside"),
    (["--keep-ratio", "0.5", "2"], "--keep-ratio is 2.0; it must be above 0 and at most 1"),
    (["--keep-tokens", "0"], "--keep-tokens is 0; "),
    (["--max-tokens", "0"], "--max-tokens is 0; "),
    (["--runs", "0"], "argument --runs: '0' is not a whole number from 1 on"),
    (["--image", "no.png"], "there is no image file no.png"),
    (["--image", "empty"], "there is no image (.bmp, .gif, .heic, .heif, .jpeg, "),
    (["--image", "broken.png"], "broken.png is not a PNG, JPEG"),
    (["--json", "nowhere/r.json"], "there is no folder "),
]


@pytest.mark.parametrize(("options", "start"), MISTAKES)
def test_a_mistake_is_a_sentence_before_a_model_is_read(options, start, tmp_path, monkeypatch,
                                                        capsys):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").write_bytes(b"no picture")
    monkeypatch.setattr(sweep, "load_model", None)
    line = refused(capsys, ["--model", "mlx", "--prompt", "a", *options])
    assert line.startswith(f"error: {start}")


def test_without_a_prompt_or_an_image_a_sentence_says_so(capsys):
    assert "there is no --prompt" in refused(capsys, ["--image", "a.png"])
    assert "there is no --image" in refused(capsys, ["--model", "mlx"])


def test_what_no_image_can_have_is_a_sentence(home, tmp_path, capsys):
    out = tmp_path / "r.json"
    for more, sentence in {
        ("--keep-tokens", "0"): "--keep-tokens is 0; it must be a whole number, at least 1",
        ("--pruner", "fastv", "--keep-tokens", "2"): "fastv",
        ("--pruner", "mlp"): "mlp is learned, and this checkpoint holds no weights for it",
        ("--prompt", "two <image> <image> ?"): "the prompt has 2 <image> marks",
        ("--kv-bits", "8"): "mlx-vlm models",
    }.items():
        assert sentence in refused(capsys, command(home, out, *more))
    assert not out.exists()


def test_a_folders_unreadable_files_are_left_out_and_named(home, tmp_path, capsys):
    write_picture(tmp_path / "a.png", 0)
    (tmp_path / "b.PNG").write_bytes(b"no picture")
    (tmp_path / "words.txt").write_text("no picture")
    result = run(home, tmp_path / "r.json", "--pruner", "norm", image=tmp_path)
    assert [name.rpartition("/")[2] for name in result["images"]] == ["a.png"]
    assert len(result["skipped"]) == 1 and "b.PNG is not a" in result["skipped"][0]
    assert "Skipped: " in capsys.readouterr().out
    assert readable_images([tmp_path, tmp_path / "a.png"])[0] == [tmp_path / "a.png"]
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image can be read: .*a\.png is empty"):
        readable_images([tmp_path])


def test_the_built_in_model_is_swept_without_options(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sweep.main(["--runs", "1", "--warmup", "0", "--max-tokens", "4"])
    result = json.loads((tmp_path / "sweep.json").read_text())
    pairs = [(row["pruner"], row["tokens"]) for row in result["rows"]]
    methods = sweep.DEFAULT_METHODS
    assert pairs == [("none", 196), *((name, K) for K in (98, 49) for name in methods)]
    assert all(row["agreement"]["same"] == 1 for row in result["rows"][:1])


def test_a_minimind2_v_and_a_llava_are_swept(tmp_path, capsys):
    write_picture(tmp_path / "a.png", 0)
    release = generations.release("minimind2-v-2025-04", False)
    folders = [
        converted(release, tmp_path), llava.write(llava.random_model(), tmp_path / "llava")
    ]  # fmt: skip
    for folder in folders:
        out = tmp_path / "r.json"
        sweep.main(["--model", str(folder), "--image", str(tmp_path / "a.png"), "--prompt", "a",
                    "--json", str(out), "--runs", "1", "--max-tokens", "3"])  # fmt: skip
        rows = json.loads(out.read_text())["rows"]
        assert len(rows) == 7 and all(row["operations"]["vision"] > 0 for row in rows)
        assert rows[-1]["cache_bytes"] < rows[0]["cache_bytes"]
