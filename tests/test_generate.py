"""Promises of the main job: the command line, its output, and its refusals."""

import io
import json
import struct
import subprocess
import sys
import zlib

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import Chat, batch_generate, generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import main

from . import tiny

QUESTION = "Is there a red star?"
JSON_KEYS = {
    "text", "token_ids", "prompt_tokens", "visual_tokens", "visual_tokens_kept", "kept_indices",
    "pruner", "positions", "ttft_ms", "prompt_tps", "generation_tps", "peak_memory_gb",
    "finish_reason", "versions",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a random tiny model (`mlx`) and two pictures."""
    folder = tmp_path_factory.mktemp("home")
    tiny.checkpoint(tiny.reference(), folder)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)).save(folder / name)
    return folder


def command(home, *more: str) -> list[str]:
    return ["--model", str(home / "mlx"), "--prompt", QUESTION, "--max-tokens", "6", *more]


def refused(capsys, argv: list[str]) -> str:
    """The one sentence of a command that must fail with code 2."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1, err
    return lines[0]


def test_json_holds_every_figure_and_the_indices_of_each_image(home, capsys):
    file = home / "a.json"
    images = ["--image", str(home / "a.png"), "--image", str(home / "b.png")]
    main(command(home, *images, "--pruner", "norm", "--keep-tokens", "5", "--json", str(file)))
    figures = json.loads(file.read_text())
    assert figures.keys() >= JSON_KEYS
    assert (figures["visual_tokens"], figures["visual_tokens_kept"]) == (2 * tiny.N, 10)
    assert [len(image) for image in figures["kept_indices"]] == [5, 5]
    assert figures["ttft_ms"].keys() == {"image", "vision", "pruner", "prefill", "total"}
    parts = sum(figures["ttft_ms"][part] for part in ("image", "vision", "pruner", "prefill"))
    assert parts == pytest.approx(figures["ttft_ms"]["total"])
    assert figures["pruner"] == "norm"
    assert figures["text"] in capsys.readouterr().out
    text = len(figures["token_ids"]) + (figures["finish_reason"] == "stop")
    assert text == figures["generation_tokens"]


@pytest.mark.parametrize("pruner", ["norm", "fastv", "avgpool", "visionzip+fastv", "none"])
def test_an_image_that_has_fewer_than_keep_tokens_keeps_all(home, pruner):
    """In every way in: the answer, and the kept tokens, are those without a pruner."""
    model, processor = load(home / "mlx")
    options = {"pruner": pruner, "keep_tokens": 99, "max_tokens": 4}
    expected = generate(model, processor, QUESTION, home / "a.png", max_tokens=4)
    (batched,) = batch_generate(model, processor, [QUESTION], [home / "a.png"], **options)
    for answer in (
        generate(model, processor, QUESTION, home / "a.png", **options), batched,
        Chat(model, processor, **options).ask(QUESTION, home / "a.png")
        if pruner != "none" else batched,
    ):  # fmt: skip
        assert (answer.token_ids, answer.visual_tokens_kept) == (expected.token_ids, tiny.N)


def test_an_iterator_of_images_gives_them_all(home):
    images = iter([home / "a.png", home / "b.png"])
    assert generate(*load(home / "mlx"), QUESTION, image=images).visual_tokens == 2 * tiny.N


def test_prompt_tokens_are_counted_after_pruning(home):
    model, processor = load(home / "mlx")
    image = home / "a.png"
    full = generate(model, processor, QUESTION, image=image, max_tokens=1)
    kept = generate(
        model, processor, QUESTION, image=image, pruner="uniform", keep_tokens=4, max_tokens=1
    )
    assert full.prompt_tokens - kept.prompt_tokens == tiny.N - 4


def test_text_alone_is_answered_too(home, capsys):
    main(command(home))
    assert "Visual tokens" not in capsys.readouterr().out


def test_a_prompt_comes_from_stdin(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION + "\n"))
    argv = [a if a != QUESTION else "-" for a in command(home, "--image", str(home / "a.png"))]
    main(argv)
    from_stdin = capsys.readouterr().out.splitlines()[1]
    main(command(home, "--image", str(home / "a.png")))
    assert capsys.readouterr().out.splitlines()[1] == from_stdin


def test_the_statistics_are_mlx_lms_three_lines_and_two_more(home, capsys):
    image = ["--image", str(home / "a.png")]
    main(command(home, *image, "--pruner", "avgpool", "--keep-ratio", "0.25"))
    out = capsys.readouterr().out.splitlines()
    starts = (
        "Prompt: ",
        "Generation: ",
        "Peak memory: ",
        "Visual tokens: ",
        "Time to first token: ",
    )
    figures = out[-5:]
    assert all(line.startswith(start) for line, start in zip(figures, starts, strict=True))
    assert figures[3] == "Visual tokens: 16 -> 4 (75.0% pruned)"


def test_without_verbose_the_answer_is_all_that_is_printed(home, capsys):
    main(command(home, "--image", str(home / "a.png"), "--no-verbose"))
    quiet = capsys.readouterr().out
    main(command(home, "--image", str(home / "a.png")))
    assert quiet == capsys.readouterr().out.splitlines(keepends=True)[1]


def test_compare_shows_both_answers_and_says_whether_they_agree(home, capsys):
    image = ["--image", str(home / "a.png")]
    main(command(home, *image, "--pruner", "norm", "--keep-tokens", "16", "--compare"))
    out = capsys.readouterr().out
    assert "All visual tokens" in out and "Pruned" in out
    assert "Answer: the same answer with 16 of 16 visual tokens" in out


@pytest.mark.parametrize("pruner", ["avgpool", "cls_attention", "similarity"])
def test_the_overlay_is_a_picture_of_what_was_kept(home, pruner):
    file = home / f"{pruner}.png"
    budget = ["--pruner", pruner, "--keep-tokens", "4", "--overlay", str(file), "--no-verbose"]
    main(command(home, "--image", str(home / "a.png"), *budget))
    with Image.open(file) as picture:
        assert picture.width >= 224


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


BAD_IMAGES = {
    "empty.png": (b"", "empty"),
    "text.png": (b"this is no picture", "image"),
    "huge.png": (png(20_000, 20_000), "25 megapixels"),
    "cut.jpg": (None, "truncated"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_refused_in_one_sentence(home, capsys, name):
    content, part = BAD_IMAGES[name]
    if content is None:
        whole = io.BytesIO()
        Image.open(home / "a.png").save(whole, format="JPEG")
        content = whole.getvalue()[: len(whole.getvalue()) // 2]
    (home / name).write_bytes(content)
    sentence = refused(capsys, command(home, "--image", str(home / name)))
    assert part in sentence and name in sentence


BAD_FLAGS = {
    "no such file": (["--image", "absent.png"], "absent.png"),
    "ratio 0": (["--pruner", "norm", "--keep-ratio", "0"], "above 0 and at most 1"),
    "ratio 1.5": (["--pruner", "norm", "--keep-ratio", "1.5"], "above 0 and at most 1"),
    "ratio nan": (["--pruner", "norm", "--keep-ratio", "nan"], "above 0 and at most 1"),
    "tokens 0": (["--pruner", "norm", "--keep-tokens", "0"], "a whole number, at least 1"),
    "both budgets": (["--pruner", "norm", "--keep-tokens", "4", "--keep-ratio", "0.5"], "not both"),
    "none with a budget": (["--pruner", "none", "--keep-tokens", "4"], "keeps all 16"),
    "unknown pruner": (["--pruner", "nrom"], "did you mean norm"),
    "unknown option": (["--pruner", "random:sed=1"], "did you mean seed"),
    "unknown layer": (["--pruner", "cls_attention:layer=9"], "layers 0 to 2"),
    "learned without weights": (["--pruner", "attention_pool"], "holds no weights"),
    "positions": (["--positions", "shuffle"], "keep or renumber"),
    "temperature": (["--temp", "-1"], "--temp"),
    "top-p": (["--top-p", "0"], "--top-p"),
    "max-tokens": (["--max-tokens", "0"], "--max-tokens"),
    "seed": (["--temp", "1", "--seed", "-1"], "--seed"),
    "option value": (["--pruner", "random:seed=-1", "--keep-tokens", "3"], "random: "),
    "not a number": (["--keep-tokens", "many"], "--keep-tokens"),
    "dtype": (["--dtype", "float8"], "float16"),
    "overlay folder": (["--overlay", "absent/kept.png"], "no folder"),
    "overlay name": (["--overlay", "kept.jpg"], ".png"),
    "json folder": (["--json", "absent/a.json"], "no folder"),
    "json onto a folder": (["--json", "."], "is a folder; name a file in it"),
    "compare without a pruner": (["--compare"], "--pruner"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_wrong_flag_is_refused_in_one_sentence(home, capsys, monkeypatch, case):
    flags, part = BAD_FLAGS[case]
    monkeypatch.chdir(home)
    argv = command(home, "--image", str(home / "a.png"), *flags)
    assert part in refused(capsys, argv)


@pytest.mark.parametrize("arguments", [("mlx_vlm_prune", "--help"), ("mlx_vlm_prune", "pruners")])
def test_a_command_without_anywhere_to_print_ends_without_a_traceback(arguments):
    run = f"{sys.executable} -m {' '.join(arguments)}"
    process = subprocess.run(["sh", "-c", f"{run} >&-"], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in process.stderr and process.returncode == 0


@pytest.mark.parametrize("flags", [("--temp", "-1"), ("--num-draft-tokens", "0")])
def test_of_a_wrong_flag_the_sample_hears_before_anything_is_shown(capsys, flags):
    with pytest.raises(SystemExit):
        main([*flags])
    shown = capsys.readouterr()
    assert shown.out == "" and f"error: {flags[0]} is {flags[1]}" in shown.err


def test_a_prompt_longer_than_the_model_reads_is_refused(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("star " * 40_000))
    argv = ["--model", str(home / "mlx"), "--prompt", "-"]
    assert "the model reads up to 32768" in refused(capsys, argv)


@pytest.mark.parametrize(
    "arguments", [("mlx_vlm_prune.generate",), ("mlx_vlm_prune", "pruners"), ("convert", "inspect")]
)
def test_a_reader_that_has_enough_is_no_error(home, arguments):
    """As in `… | head -1`."""
    more = {"mlx_vlm_prune.generate": command(home), "convert": [str(home / "mlx")]}
    argv = [sys.executable, "-m", *arguments, *more.get(arguments[0], [])]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout and run.stderr
        run.stdout.close()
        assert run.stderr.read() == b""


def test_images_without_marks_and_marks_without_images_are_counted(home, capsys):
    argv = ["--model", str(home / "mlx"), "--prompt", "<image> and <image>?"]
    sentence = refused(capsys, [*argv, "--image", str(home / "a.png")])
    assert "2" in sentence and "1" in sentence


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "nowhere"])
def test_a_folder_that_is_not_there_is_refused(capsys, name):
    assert "nowhere" in refused(capsys, ["--model", name, "--prompt", "hello"])


def test_a_folder_that_is_no_checkpoint_is_refused(capsys, tmp_path):
    assert str(tmp_path) in refused(capsys, ["--model", str(tmp_path), "--prompt", "hello"])


@pytest.mark.parametrize("fault", ["missing", "misshapen", "extra"])
def test_a_tensor_at_fault_is_named(home, capsys, tmp_path, fault):
    broken = copy_of(home / "mlx", tmp_path / "broken")
    weights = mx.load(str(broken / "model.safetensors"))
    name = "language.layers.1.mlp.up_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "misshapen":
        weights[name] = weights[name][:-1]
    else:
        weights[name := "language.layers.9.mlp.up_proj.weight"] = mx.zeros((2, 2))
    mx.save_safetensors(str(broken / "new.safetensors"), weights, metadata={"format": "mlx"})
    (broken / "new.safetensors").replace(broken / "model.safetensors")
    assert name in refused(capsys, ["--model", str(broken), "--prompt", "hello"])


@pytest.mark.parametrize("value", [0, -3, 1 << 40, "many", None, True])
def test_a_size_that_no_model_has_is_refused_before_anything_is_allocated(
    home, capsys, tmp_path, value
):
    broken = copy_of(home / "mlx", tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = value
    (broken / "config.json").write_text(json.dumps(config))
    assert "num_hidden_layers" in refused(capsys, ["--model", str(broken), "--prompt", "hello"])


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_full_disk_leaves_no_half_written_file(home, capsys, monkeypatch, tmp_path):
    def full(self, *args, **options):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr("pathlib.Path.write_text", full)
    sentence = refused(capsys, command(home, "--json", str(tmp_path / "a.json")))
    assert "No space left" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_result_without_an_image_has_no_overlay(home):
    model, processor = load(home / "mlx")
    with pytest.raises(UserError, match="no image"):
        generate(model, processor, QUESTION, max_tokens=1).overlay()


@pytest.mark.parametrize("given", ["{", "[1]", "3", '"a"'])
def test_template_options_that_are_no_object_are_refused(given, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--chat-template-config", given])
    assert stop.value.code == 2 and "is no JSON object" in capsys.readouterr().err


def test_template_options_cannot_replace_the_question(capsys):
    main(["--chat-template-config", '{"messages": [], "self": 1}', "--no-verbose"])
    assert capsys.readouterr().out.strip()
