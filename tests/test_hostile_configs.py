"""Promises about JSON files from strangers: whatever stands in them, they are read, or refused in
one sentence, by every command."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from convert.__main__ import main
from convert.describe import describe
from convert.to_hf import to_hf
from convert.to_torch import to_torch
from convert.twig import read_twig
from mlx_vlm_prune import generate, load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.hosts.loading import kind_of
from mlx_vlm_prune.inputs.preprocessor import Preprocessor
from mlx_vlm_prune.inputs.prompt import Tokenizer

from . import backbones, generations, host_folders, llava, tiny
from .limited import run_limited
from .test_generations import converted

MANY = ("missing", None, -1, 0, 3, 10**12, 10**400, "x", [], {}, True, [1, 2], 0.5)
FEW = ("missing", -1, 10**400, "x", [])
TWO = ("missing", "x")


def places(held: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    """Of every entry of an object, and of those inside; a folder's history is one entry deep."""
    for key, value in held.items():
        yield (*above, key)
        if isinstance(value, dict) and "published" not in above:
            yield from places(value, *above, key)


def damaged(file: Path, values: Sequence[Any], part: str) -> Iterator[None]:
    """The file with each of its entries, or those of a part, missing or something else."""
    whole = file.read_text()
    for *above, key in places(json.loads(whole)):
        for value in values if part in ("", *above) else ():
            content = inner = json.loads(whole)
            for name in above:
                inner = inner[name]
            inner.pop(key)
            inner |= {} if value == "missing" else {key: value}
            file.write_text(json.dumps(content))
            yield
    file.write_text(whole)


def refusals(
    file: Path, *ways: Callable[[], Any], values: Sequence[Any] = FEW, part: str = ""
) -> int:
    """How often a damaged file is refused in one way or another; nothing else may happen."""
    count = 0
    for _ in damaged(file, values, part):
        for way in ways:
            try:
                way()
            except UserError as e:
                assert "\n" not in str(e)
                count += 1
    return count


@pytest.fixture
def back(tmp_path) -> Callable[[Path], Callable[[], None]]:
    """What converts one of our folders back, twice, and removes what that made."""

    def of(folder: Path) -> Callable[[], None]:
        def there() -> None:
            try:
                to_torch(folder, tmp_path / "back")
                to_hf(folder, tmp_path / "hf")
            finally:
                for target in (tmp_path / "back", tmp_path / "hf"):
                    target.unlink() if target.is_file() else shutil.rmtree(
                        target, ignore_errors=True
                    )

        return there

    return of


@pytest.mark.parametrize("name", ["minimind2-v", "minimind-3v-2026-04-19"])
def test_any_config_of_ours_is_read_or_refused(tmp_path, capsys, back, name):
    target = converted(generations.release(name, True), tmp_path)
    ways = (lambda: describe(target), lambda: load(target), back(target))
    assert refusals(target / "config.json", *ways, values=MANY) > 400


def test_any_config_of_ours_of_a_llava_is_read_or_refused(tmp_path, capsys):
    folder, target = llava.write(llava.random_model(), tmp_path / "llava"), tmp_path / "mlx"
    main(["to-mlx", str(folder), str(target)])
    ways = (lambda: describe(target), lambda: load(target))
    assert refusals(target / "config.json", *ways) > 200


def test_any_config_of_ours_of_a_llava_by_its_authors_goes_back_or_is_refused(
    tmp_path, capsys, back
):
    model = llava.random_model("vicuna, heads as wide as OpenAI's")
    folder = llava.write_original(model, tmp_path / "llava", inside=True)
    main(["to-mlx", str(folder), str(tmp_path / "mlx")])
    assert refusals(tmp_path / "mlx" / "config.json", back(tmp_path / "mlx"), values=TWO) > 40


def test_any_config_of_a_published_llava_is_read_or_refused(tmp_path):
    folder = llava.write(llava.random_model(), tmp_path / "llava")
    ways = (lambda: read_checkpoint(folder), lambda: kind_of(folder))
    assert refusals(folder / "config.json", *ways) > 100


@pytest.mark.parametrize("kind", backbones.KINDS)
def test_any_config_of_what_mlx_lm_computes_is_read_or_refused(tmp_path, kind):
    folder = backbones.write(kind, tmp_path / "llava")
    way = lambda: read_checkpoint(folder)  # noqa: E731
    assert refusals(folder / "config.json", way, part="text_config") > 20


def test_no_twig_grows_on_what_mlx_lm_computes(tmp_path):
    config = read_checkpoint(backbones.write("phi", tmp_path / "phi")).config
    with pytest.raises(UserError, match="does not grow on a language model of mlx-lm's"):
        read_twig(tmp_path / "twig.safetensors", 1, config)


def test_any_config_of_a_llava_by_its_authors_or_of_its_tower_is_read_or_refused(tmp_path):
    folder = llava.write_original(llava.random_model(), tmp_path / "llava")
    tower = tmp_path / "clip"
    ways = (
        lambda: describe(folder, tower),
        lambda: read_checkpoint(folder, tower),
        lambda: kind_of(folder),
    )
    assert refusals(folder / "config.json", *ways, values=TWO) > 20
    assert refusals(tower / "config.json", ways[1], values=TWO) > 5


def test_any_config_of_a_tower_is_read_or_refused(tmp_path):
    pth, tower = tiny.publish(tiny.reference(), tmp_path)
    tiny.write_words(tmp_path / "words")
    way = (lambda: read_checkpoint(pth, tower, tmp_path / "words"), lambda: describe(pth, tower))
    assert refusals(tower / "config.json", *way) > 50


def test_any_file_of_a_processor_is_read_or_refused(tmp_path):
    folder = llava.write(llava.random_model(), tmp_path / "llava")
    way: Callable[[], Any] = lambda: Tokenizer.from_folder(folder)  # noqa: E731
    assert refusals(folder / "tokenizer_config.json", way, values=MANY) > 5
    llava.llama_words(folder, llava.LLAVA_1_5)
    assert refusals(folder / "chat_template.json", way, values=MANY) > 5
    preprocessor = {
        "crop_size": {"height": 64, "width": 64}, "do_center_crop": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 3, "rescale_factor": 0.5, "size": {"shortest_edge": 64}, "do_pad": False,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    way = lambda: Preprocessor.from_folder(folder)  # noqa: E731
    assert refusals(folder / "preprocessor_config.json", way, values=MANY) > 60


@pytest.fixture
def ours(tmp_path) -> Path:
    """A folder of ours."""
    return tiny.checkpoint(tiny.reference(), tmp_path)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "num_hidden_layers", 10**9),
        ("text_config", "hidden_size", -1),
        ("text_config", "hidden_size", "48"),
        ("text_config", "num_attention_heads", 5),
        ("vision_config", "patch_size", 0),
        ("vision_config", "image_size", 1 << 40),
        ("text_config", "rope_theta", "x"),
    ],
)
def test_a_size_that_cannot_be_is_refused_at_once(ours, part, name, value):
    config = json.loads((ours / "config.json").read_text())
    config[part][name] = value
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load(ours)


@pytest.mark.parametrize("crop", [{"crop_size": 32}, {"do_center_crop": False}])
def test_a_preprocessor_that_makes_other_pictures_than_the_tower_reads_is_refused(ours, crop):
    file = ours / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | crop))
    with pytest.raises(UserError, match="the tower reads 64 x 64"):
        load(ours)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "bert"}', "[" * 100_000])
def test_a_folder_with_another_config_is_no_checkpoint(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)):
        load(tmp_path)


def test_a_model_of_mlx_vlm_without_mlx_vlm_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    for name in ("mlx_vlm", "mlx_vlm.utils"):  # as if it were not there
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="pip install"):
        load(tmp_path)


@pytest.mark.parametrize("name", [["x"], {"a": 1}, None, 7])
def test_a_template_whose_name_is_no_text_is_not_the_default(ours, name):
    settings = {"chat_template": [{"name": name, "template": "a"}]}
    (ours / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="none is called default"):
        load(ours)


def test_a_token_that_is_no_text_is_refused(ours):
    config = json.loads((ours / "config.json").read_text()) | {"image_token": "\ud800"}
    (ours / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"image_token is .* not the text of a token"):
        load(ours)


@pytest.mark.parametrize("change", [lambda i: i + 10**6, lambda i: None if i % 3 else i])
def test_a_tokenizer_without_the_models_ids_is_not_the_models(ours, change):
    """Answers would be empty."""
    file = ours / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    moved = {word: number if number < 9 else change(number) for word, number in words.items()}
    content["model"]["vocab"] = {word: i for word, i in moved.items() if i is not None}
    content["model"]["merges"] = []
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="do not belong together"):
        load(ours)


def test_a_model_whose_config_names_another_family_is_told(tmp_path):
    model, processor = load(host_folders.checkpoint("qwen3_vl", tmp_path))
    model.config.model_type = "llava"
    with pytest.raises(UserError, match="a qwen3_vl model's config calls it a llava model"):
        generate(model, processor, "w1")


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint"):
        load(tmp_path)


FUZZ = """
import copy, json, random, sys
from pathlib import Path
from tests.test_hostile_configs import ODD, places
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError

folder, draw, counts = Path(sys.argv[1]), random.Random(20), {"read": 0, "refused": 0}
files = [folder / name for name in sys.argv[2:]]
whole = {file: file.read_text() for file in files}
for case in range(1000):
    file = draw.choice(files)
    content = json.loads(whole[file])
    for _ in range(draw.choice((1, 1, 2, 4))):
        *above, key = draw.choice([*places(content)] or [("x",)])
        inner = content
        for name in above:
            inner = inner[name]
        inner[key] = copy.deepcopy(draw.choice(ODD))
    file.write_text(json.dumps(content))
    try:
        _, processor = load(folder)
        tokenizer = processor.tokenizer
        tokenizer.encode("a")
        tokenizer.eos_token_ids
        counts["read"] += 1
    except UserError as e:
        assert "\\n" not in str(e) and len(str(e)) < 700, e
        counts["refused"] += 1
    file.write_text(whole[file])
print(counts["read"], counts["refused"])
"""
ODD: list[Any] = [
    None, True, 0, 1, -1, 1.5, 1e400, 1048576, 1 << 31, 1 << 63, 10**400, "", "x", "\ud800", "\0",
    "llama", ["llama"], [], [[1], 2], [[]], {}, {"model_type": ["x"]}, {"content": "\ud800"},
    {"a": {}}, [{"name": ["default"], "template": "x"}], [{"name": "default", "template": 1}],
    "x" * 5000, [0] * 999,
]  # fmt: skip


def test_a_thousand_configs_are_read_or_refused_within_limits(ours):
    (ours / "special_tokens_map.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')
    (ours / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.5}')
    names = ("config", "tokenizer_config", "special_tokens_map", "generation_config")
    files = [f"{name}.json" for name in (*names, "preprocessor_config")]
    read, refused = run_limited(FUZZ, ours, *files, seconds=120).split()
    assert int(read) > 100 and int(refused) > 100
