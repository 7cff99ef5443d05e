"""Promises of the command `encode`: figures by hand, classes from folders and files, refusals."""

import json
import re
import shlex
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune import encode, encode_images, load, load_encoder
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.evaluation import encoding
from mlx_vlm_prune.evaluation.encoding import (
    best_texts,
    cases_of,
    cosines,
    encode_batches,
    rows,
)
from mlx_vlm_prune.evaluation.labelled_images import find_images, texts_of_classes

from . import dual_encoders as tiny


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with a CLIP, a SigLIP, plain images, and images by class."""
    folder = tmp_path_factory.mktemp("desk")
    tiny.write(tiny.random_clip(), folder / "clip")
    tiny.write(tiny.random_siglip(), folder / "siglip")
    tiny.write_pictures(folder / "plain", 5)
    tiny.write_pictures(folder / "classes", 24, ("cat", "hot_dog", "star"))
    return folder


def run(desk: Path, model: str, images: str, *options: str) -> dict:
    """The JSON that the command writes."""
    file = desk / "r.json"
    encode.main(
        ["--model", str(desk / model), "--image", str(desk / images), "--json", str(file), *options]
    )
    return json.loads(file.read_text())


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        encode.main(list(arguments))
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_the_table_and_the_json_have_every_case(desk, capsys):
    result = run(desk, "clip", "plain", "--pruner", "patch_norm", "tome", "--batch-size", "2",
                 "--runs", "2")  # fmt: skip
    out = capsys.readouterr().out
    cases = [(row["pruner"], row["tokens"]) for row in result["rows"]]
    counts = (16, 11, 8)
    assert cases == [
        ("none", 16),
        *(("patch_norm", K) for K in counts),
        *(("tome", K) for K in counts),
    ]
    assert [row["cosine"] for row in result["rows"] if row["tokens"] == 16] == [1.0] * 3
    assert all(row["cosine_least"] < row["cosine"] < 1 for row in result["rows"][2:4])
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
        assert "accuracy" not in row and "chosen_texts" not in row
    assert (
        result["command"] == "encode"
        and result["machine"].keys() >= {"cpu", "cores"}
        and result["versions"]["mlx"]
    )
    assert (result["images"], result["labelled"], result["model_type"]) == (5, 0, "CLIP")
    assert result["files"] == [f"{i}.png" for i in range(5)]
    lines = out.splitlines()
    assert lines[0].split() == [
        "pruner", "tokens", "share", "ms/image", "±", "images/s", "speed", "cosine", "least",
    ]  # fmt: skip
    assert lines[1].startswith("none        16 of 16   100%") and lines[3].split()[1:5] == [
        "11", "of", "16", "69%",
    ]  # fmt: skip
    assert "5 images, 2 at once, in turns, 2 of each batch." in out


def test_larger_images_are_read_where_max_pixels_allows_them(desk, tmp_path, capsys):
    Image.new("RGB", (90, 80), "red").save(tmp_path / "a.png")
    argv = ["--model", str(desk / "clip"), "--image", str(tmp_path / "a.png"), "--max-pixels"]
    limit = "has more than the 0.007199 megapixels allowed; --max-pixels allows more"
    assert limit in refusal(capsys, *argv, "7199")
    assert "--max-pixels is 0; it must be a whole number from 1" in refusal(capsys, *argv, "0")
    encode.main([*argv, "7200"])


def test_the_embeddings_of_every_case_are_written(desk):
    file = desk / "features.safetensors"
    run(desk, "siglip", "plain", "--pruner", "norm", "--keep-tokens", "4", "--out", str(file),
        "--text", "a cat", "a dog")  # fmt: skip
    written = mx.load(str(file))
    assert set(written) == {"full", "norm@4", "text"} and written["text"].shape == (2, 32)
    model, processor = load_encoder(desk / "siglip")
    images = [desk / "plain" / f"{i}.png" for i in range(5)]
    for name, options in (("full", {}), ("norm@4", {"pruner": "norm", "keep_tokens": 4})):
        expected = encode_images(model, processor, images, **options)
        np.testing.assert_allclose(written[name], expected, rtol=1e-5, atol=1e-6)


def test_sub_folders_are_classes_with_a_text_each(desk, capsys):
    result = run(desk, "clip", "classes", "--pruner", "patch_norm", "--keep-ratio", "1.0", "0.5")
    assert result["texts"] == ["a photo of a cat.", "a photo of a hot dog.", "a photo of a star."]
    assert result["right_texts"] == [0] * 8 + [1] * 8 + [2] * 8
    full, whole, half = result["rows"]
    assert full["chosen_texts"] == whole["chosen_texts"] and whole["same_text"] == 1
    right, chosen = result["right_texts"], half["chosen_texts"]
    assert half["accuracy"] == np.mean([a == b for a, b in zip(right, chosen, strict=True)])
    difference, low, high = half["to_full"]
    assert difference == pytest.approx(half["accuracy"] - full["accuracy"], abs=1e-4)
    assert low <= difference <= high and full["to_full"] == [0, 0, 0]
    assert "zero-shot, of 24 images with a class" in capsys.readouterr().out


def test_a_csv_file_gives_the_classes(desk, capsys):
    file = desk / "labels.csv"
    file.write_text("file_name,label\n0.png,dog\n3.png,cat\n")
    texts = ["--text", "a photo of a cat", "a photo of a dog", "a red star"]
    result = run(desk, "siglip", "plain", "--labels", str(file), *texts)
    assert result["right_texts"] == [1, None, None, 0, None]
    assert result["labelled"] == 2 and result["rows"][0]["to_full"] == [0, None, None]
    file.write_text("file_name,label\n9.png,dog\n")
    arguments = [
        "--model",
        str(desk / "clip"),
        "--image",
        str(desk / "plain"),
        "--labels",
        str(file),
    ]
    capsys.readouterr()
    assert "names 9.png, which is none of the 5 images" in refusal(capsys, *arguments)
    file.write_text("path,label\n0.png,dog\n")
    assert "line 2: there must be a file_name and a label" in refusal(capsys, *arguments)


def test_a_class_is_one_text_or_words_of_one():
    texts = ["a photo of a cat", "a hot dog", "a dog"]
    assert texts_of_classes(["cat", "hot_dog"], texts, "")[1] == {"cat": 0, "hot_dog": 1}
    assert texts_of_classes(["a dog", "cat"], texts, "")[1] == {"a dog": 2, "cat": 0}
    with pytest.raises(UserError, match="the class 'dog' is in 2 of the 3 texts"):
        texts_of_classes(["dog"], texts, "")
    with pytest.raises(UserError, match="the class 'ca' is in none of the 3 texts"):
        texts_of_classes(["ca"], texts, "")
    with pytest.raises(UserError, match=r"template is 'a photo'; it must have \{\}"):
        texts_of_classes(["dog"], [], "a photo")


def test_images_are_listed_by_name_without_hidden_ones(tmp_path):
    for name in ("b.png", "a.JPG", ".hidden.png", "notes.txt", "cat/z.webp", "cat/deep/y.png",
                 ".cache/x.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    images = find_images([tmp_path, tmp_path / "b.png"])
    assert [(image.name, image.label) for image in images] == [
        ("a.JPG", None), ("b.png", None), ("cat/deep/y.png", "cat"), ("cat/z.webp", "cat"),
    ]  # fmt: skip


def test_a_file_given_twice_is_one_image_of_its_class(desk):
    folder = desk / "classes"
    file = folder / "cat" / "0.png"
    twice = find_images([file, folder / "cat" / ".." / "cat" / "0.png", folder])
    assert len(twice) == 24 and [image.label for image in twice].count("cat") == 8
    arguments = [str(desk / "plain" / "0.png"), "--limit", "3"]
    assert run(desk, "clip", "plain/0.png", "--image", *arguments)["images"] == 1


def test_cosines_and_the_nearest_text_by_hand(monkeypatch):
    a_ID, b_ID = np.array([[3.0, 4], [1, 0], [1, 1]]), np.array([[3.0, 4], [0, 2], [1, 0]])
    np.testing.assert_allclose(cosines(a_ID, b_ID), [1, 0, 0.5**0.5])
    x_ID = np.random.default_rng(0).normal(size=(500, 24)).astype(np.float32)
    assert (cosines(x_ID, x_ID) == 1).all()
    monkeypatch.setattr(encoding, "COMPARED_AT_ONCE", 2)
    assert best_texts(a_ID, np.array([[9.0, 0], [1, 1], [1, 1]])).tolist() == [1, 0, 1]


class TimedEncoder:
    """Stands in for a model: notes what is encoded, and each case has its own features."""

    dtype = mx.float32

    def __init__(self):
        self.calls: list[tuple[str, int]] = []

    def encode_images(self, pixels_BHW3, pipeline, K):
        self.calls.append((pipeline.spec, len(pixels_BHW3)))
        return mx.ones((len(pixels_BHW3), 2)) * K


def test_cases_take_turns_and_a_smaller_batch_is_not_timed(desk):
    model, _ = load_encoder(desk / "clip")
    cases, refused = cases_of(model, ["patch_norm"], [0.5, 8, 1.0])
    assert [case.K for case in cases] == [16, 8, 16] and not refused
    encoder, batches = TimedEncoder(), [np.zeros((2, 1, 1, 3)), np.zeros((1, 1, 1, 3))]
    assert list(encode_batches(encoder, cases, iter(batches), 2)) == [2] * 9 + [1] * 6
    names = ["none", "patch_norm", "patch_norm"]
    turns = [names[i:] + names[:i] for i in (0, 0, 1, 2, 0)]  # the first is not timed
    expected = [(n, 2) for turn in turns[:3] for n in turn] + [(n, 1) for t in turns[3:] for n in t]
    assert encoder.calls == expected
    assert [len(case.batch_ms) for case in cases] == [2, 2, 2]
    assert [row["cosine"] for row in rows(cases, None, [None] * 3)] == [1.0] * 3
    assert cases[1].features_ID.shape == (3, 2)


def test_a_method_that_has_no_place_is_listed_and_alone_refused(desk, capsys):
    result = run(desk, "clip", "plain", "--pruner", "norm", "patch_norm", "--keep-ratio", "0.5")
    assert [row["pruner"] for row in result["rows"]] == ["none", "patch_norm"]
    assert [entry["pruner"] for entry in result["refused"]] == ["norm"]
    out = capsys.readouterr().out
    assert "Not run: norm chooses among the tower's" in out and "ahead of it (8 tokens)" in out
    start = ["--model", str(desk / "clip"), "--image", str(desk / "plain"), "--pruner"]
    assert refusal(capsys, *start, "norm").startswith(
        "error: norm chooses among the tower's outputs"
    )
    assert "behind a projector, and a CLIP alone has none" in refusal(capsys, *start, "divprune")
    assert "a language model's layers" in refusal(capsys, *start, "fastv")


def test_mistakes_are_named_in_one_sentence(desk, capsys, tmp_path):
    model, images = ["--model", str(desk / "clip")], ["--image", str(desk / "plain")]
    start = [*model, *images]
    assert "give a model, which is a CLIP or SigLIP, and images" in refusal(capsys, *model)
    assert "--batch-size is 0; " in refusal(capsys, *start, "--batch-size", "0")
    pruner = ["--pruner", "patch_norm", "--keep-ratio"]
    assert "--keep-ratio is 1.5; " in refusal(capsys, *start, *pruner, "1.5")
    assert "a budget needs a pruner" in refusal(capsys, *start, "--keep-ratio", "0.5")
    assert "there is no image" in refusal(capsys, *model, "--image", str(tmp_path))
    assert "there is no image file nowhere.png" in refusal(capsys, *model, "--image", "nowhere.png")
    tokens = ["--pruner", "patch_norm", "--keep-tokens", "0"]
    assert "--keep-tokens is 0; it must be a whole number" in refusal(capsys, *start, *tokens)
    assert "there is no folder" in refusal(capsys, *start, "--out", str(tmp_path / "x" / "y"))
    assert "no pruner is called 'patchnorm'; did you mean patch_norm" in refusal(
        capsys, *start, "--pruner", "patchnorm"
    )


def test_a_bad_image_is_named_or_left_out(desk, capsys, tmp_path):
    folder = tiny.write_pictures(tmp_path / "images", 3)
    (folder / "1.png").write_bytes(b"no picture")
    start = ["--model", str(desk / "clip"), "--image", str(folder)]
    assert "1.png is not a PNG" in refusal(capsys, *start)
    encode.main([*start, "--skip-bad", "--json", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["files"] == ["0.png", "2.png"] and len(result["skipped"]) == 1
    assert "Skipped: " in capsys.readouterr().out


def test_texts_are_not_needed_for_speed_and_cosines(desk, tmp_path):
    """A folder without a tokenizer is enough."""
    clip = tmp_path / "clip"
    clip.mkdir()
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (clip / name).write_bytes((desk / "clip" / name).read_bytes())
    arguments = ["--model", str(clip), "--image", str(desk / "plain" / "0.png")]
    encode.main(arguments)
    with pytest.raises(SystemExit):
        encode.main([*arguments, "--text", "a cat"])


def test_a_smaller_image_counts_the_tokens_that_it_has(desk, capsys):
    ratios = ["--keep-ratio", "0.7", "0.6", "0.25"]  # 11 and 9 tokens are at most 3 x 3
    result = run(desk, "siglip", "plain", "--pruner", "downsample", *ratios)
    assert [row["tokens"] for row in result["rows"]] == [16, 9, 4]


def test_images_that_have_fewer_tokens_than_asked_for_keep_all(desk, capsys):
    tokens = ["--keep-tokens", "17", "99"]
    full, pruned = run(desk, "siglip", "plain", "--pruner", "norm", *tokens)["rows"]
    assert (full["tokens"], pruned["tokens"]) == (16, 16)
    assert pruned["cosine"] == pytest.approx(1, abs=1e-6)


def test_what_the_page_shows_runs(desk, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[1] / "docs/encode.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("clip-vit-base-patch16").symlink_to(desk / "clip")
    Path("siglip-base-patch16-224").symlink_to(desk / "siglip")
    Path("photos").symlink_to(desk / "plain")
    Path("labels.csv").write_text("file_name,label\n0.png,dog\n3.png,cat\n")
    (block,) = re.findall(r"```bash\n(.*?)```", page, re.S)
    commands = [shlex.split(line)[1:] for line in block.replace("\\\n", "").splitlines()]
    assert [command for command, *_ in commands] == ["encode"] * 3
    for _, *arguments in commands:
        encode.main(arguments)
    assert "cosine" in capsys.readouterr().out
    assert (
        json.loads(Path("encode.json").read_text())["runs"] == 3
        and Path("features.safetensors").is_file()
    )
    (program,) = re.findall(r"```python\n(.*?)```", page, re.S)
    exec(program, {})
    assert len(json.loads(capsys.readouterr().out)) == 2


def test_an_interrupt_ends_in_one_line_and_writes_nothing(desk, monkeypatch, capsys, tmp_path):
    opened = encode.open_image

    def interrupted(path, *limit):
        if Path(path).name == "3.png":
            raise KeyboardInterrupt
        return opened(path, *limit)

    monkeypatch.setattr(encode, "open_image", interrupted)
    file = tmp_path / "r.json"
    arguments = ["--model", str(desk / "clip"), "--image", str(desk / "plain"), "--batch-size", "2"]
    with pytest.raises(SystemExit) as stop:
        encode.main([*arguments, "--json", str(file)])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (130, "") and not file.exists()
    assert err.strip() == "interrupted: 2 of 5 images are encoded; nothing is written"


def test_load_says_which_command_such_a_model_is_for(desk):
    with pytest.raises(UserError, match="no language model; `mlx-vlm-prune encode`"):
        load(desk / "siglip")


def test_a_learned_method_has_no_weights_here(desk):
    model, processor = load_encoder(desk / "clip")
    with pytest.raises(UserError, match="mlp is learned, and this checkpoint holds no weights"):
        encode_images(model, processor, tiny.pictures(1), "mlp", keep_tokens=4)


@pytest.mark.parametrize("texts", [None, 3, b"a cat", ["a cat", None], [["a cat"]]])
def test_what_is_no_text_is_refused(desk, texts):
    model, processor = encode.load_encoder(desk / "clip")
    with pytest.raises(UserError, match=r"a text is .*; it must be a str"):
        encode.encode_texts(model, processor, texts)
