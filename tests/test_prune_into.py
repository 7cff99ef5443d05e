"""Promises of `convert prune-into`: mlx-vlm answers from the folder as our own path would.

Shapes: T tokens, V words.
"""

import ast
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_map_with_path

from convert.describe import as_text, describe
from mlx_vlm_prune import generate, load, pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.mlx_vlm_folder import RECORD
from mlx_vlm_prune.hosts.families import FAMILIES
from mlx_vlm_prune.hosts.prepared_inputs import PreparedInputs
from mlx_vlm_prune.hosts.pruned_folder import prune_into

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from . import host_folders, into_folders
from .host_models import KINDS, TEXT
from .into_folders import (
    answer,
    assert_same,
    checkpoint,
    config_of,
    inputs_of,
    max_images,
    ours,
    video,
)
from .recent_host_models import RECENT

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
EVERYWHERE = ["random:seed=3", "uniform", "avgpool", "norm", "similarity", "divprune", "apet"]
READERS = ["received_attention", "cdpruner", "norm+divprune"]  # of layers, of words; a chain
WITH_CLS = ["cls_attention", "vispruner", "holov", "scope", "cls_attention:layer=0"]
CLS = ("llava", "llava_next", "internvl_chat")
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
BUDGETS = {"ratio": (0.5, None), "tokens": (None, 3)}
IN_EVERY_FAMILY = ["divprune", "received_attention"]


def specs_of(kind: str) -> list[str]:
    """Two methods, and of the others every third, so that three families share each."""
    if kind in RECENT:
        return IN_EVERY_FAMILY
    specs = EVERYWHERE + READERS + (WITH_CLS if kind in CLS else [])
    first = [*KINDS].index(kind)
    shared = [spec for n, spec in enumerate(specs) if (n + first) % 3 == 0]
    return [*dict.fromkeys(IN_EVERY_FAMILY + shared)]


CASES = [
    (kind, spec, called)
    for kind in KINDS
    for spec in specs_of(kind)
    for called in (["ratio"] if spec in READERS else BUDGETS)
]
INSIDE = [kind for kind in KINDS if FAMILIES[kind].why_no_encoder_methods is None]
CASES += [
    (kind, spec, called)
    for kind in INSIDE
    for spec, called in {"tome": "ratio", "kq_norm": "tokens"}.items()
]
CASES += [(kind, "divprune:budget=similarity,reference=0.9", "ratio") for kind in CLS]
CASES.append(("llava", "zoo_prune", "ratio"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny checkpoint of every family, and with what is made of them."""
    folder = tmp_path_factory.mktemp("into")
    with into_folders.fastvlm_sizes():
        for kind in KINDS:
            checkpoint(kind, folder)
        yield folder


@pytest.fixture(scope="module")
def stocks(home):
    """The models that are not pruned, as mlx-vlm loads them."""
    return {kind: loaded(home / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def full(stocks):
    """What those answer about all their images."""
    return {k: answer(k, model, inputs_of(k, model, max_images(k))) for k, model in stocks.items()}


def loaded(folder: Path) -> Any:
    from mlx_vlm.utils import load_model

    return load_model(folder)


def pruned_model(home: Path, kind: str, spec: str, ratio=None, tokens=None) -> Any:
    """The model of a pruned folder, which is written where it is not there."""
    name = f"{kind}-{spec}-{ratio}-{tokens}".translate(str.maketrans(":=+", "___"))
    if not (home / name).is_dir():
        prune_into(home / kind, home / name, spec, ratio, tokens)
    return loaded(home / name)


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_whose_a_folder_is_and_what_prunes_it(kind, home, tmp_path):
    bits = {"quantization": {"bits": 4, "group_size": 64}}
    source = shutil.copytree(home / kind, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | bits))
    before = as_text(describe(source), source)
    assert f"{config['model_type']}, for mlx-vlm, if it knows this kind: nothing is" in before
    assert f"layers of {TEXT['hidden_size']}" in before and "4 bits, groups of 64" in before
    assert f"generate --model {source} --pruner NAME" in before and "F32" in before
    for at, (ratio, tokens, kept) in enumerate([(0.5, None, "0.5"), (None, 3, "3")]):
        prune_into(source, tmp_path / f"pruned{at}", "norm", ratio, tokens, vendor=bool(at))
        after = as_text(describe(tmp_path / f"pruned{at}"), source)
        assert f"norm, which keeps {kept} of an image's visual tokens" in after
        assert "pruned.py, whenever mlx-vlm loads this folder" in after
    for record in ({}, 5, {"pruner": "norm"}):
        (source / "config.json").write_text(
            json.dumps({**config, "quantization": {}, RECORD: record})
        )
        after = as_text(describe(source), source)
        assert "the record of how is damaged" in after
        assert "None" not in after and "quantized" not in after and "executes" not in after


@pytest.mark.parametrize(("kind", "spec", "called"), CASES)
def test_mlx_vlm_answers_as_our_own_path_does(home, stocks, full, kind, spec, called):
    whole = stocks[kind]
    inputs = inputs_of(kind, whole, max_images(kind))
    model = pruned_model(home, kind, spec, *BUDGETS[called])
    answered = answer(kind, model, inputs)
    assert_same(answered, ours(whole, inputs, spec, *BUDGETS[called]))
    assert np.abs(answered[1][0] - full[kind][1][0]).max() > 1e-3  # so something was pruned
    report = model.pruning_report
    assert 0 < report.kept < report.total and len(report.prompts) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_tokens_or_no_image_it_is_the_stock_model_bit_for_bit(home, stocks, kind):
    model = pruned_model(home, kind, "divprune", 1.0)
    for images in range(max_images(kind) + 1):
        words = PreparedInputs([3, 9, 4], mx.ones((1, 3), mx.int32))
        inputs = inputs_of(kind, model, images) if images else words
        tokens, odds = answer(kind, model, inputs)
        expected, expected_odds = answer(kind, stocks[kind], inputs)
        assert tokens == expected
        np.testing.assert_array_equal(odds, expected_odds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_read_in_chunks_gives_the_same(home, kind):
    model = pruned_model(home, kind, "divprune", 0.5)
    inputs = inputs_of(kind, model, 1)
    whole = answer(kind, model, inputs, prefill_step_size=None)
    assert_same(answer(kind, model, inputs, prefill_step_size=3), whole)


@pytest.mark.parametrize("kind", QWEN)
def test_wrong_positions_would_not_pass(home, stocks, kind, tmp_path):
    """The control: the same tokens, at positions without gaps."""
    pruned_model(home, kind, "divprune", 0.5)
    folder = shutil.copytree(home / f"{kind}-divprune-0.5-None", tmp_path / "wrong")
    text = (folder / "pruned.py").read_text()
    assert text.count("attach(self, PRUNER, ") == 1
    wrong = text.replace("attach(self, PRUNER, ", "attach(self, PRUNER, positions='renumber', ")
    (folder / "pruned.py").write_text(wrong)
    inputs = inputs_of(kind, stocks[kind], max_images(kind))
    expected = ours(stocks[kind], inputs, "divprune", 0.5, None)[1]
    assert np.abs(answer(kind, loaded(folder), inputs)[1] - expected).max() > 1e-3


@pytest.mark.parametrize("kind", QWEN)
def test_a_clip_is_pruned_as_in_a_block(home, stocks, kind):
    tokens, odds = answer(kind, pruned_model(home, kind, "divprune", 0.5), video())
    with pruned(stocks[kind], "divprune", keep_ratio=0.5) as report:
        expected, expected_odds = answer(kind, stocks[kind], video())
    assert tokens == expected and (report.total, report.kept) == (12, 6)
    np.testing.assert_array_equal(odds, expected_odds)


def test_the_file_is_well_written_and_says_what_it_is(home, tmp_path):
    files = []
    for kind in KINDS:
        for spec, options in (("norm+divprune", {}), ("cdpruner", {"vendor": True})):
            folder = tmp_path / f"{kind}-{spec}"
            prune_into(home / kind, folder, spec, 0.5, None, **options)
            files.append(folder / "pruned.py")
            text = files[-1].read_text()
            about = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
            assert f"This {kind} model keeps 0.5 of each image's visual tokens, by {spec}" in about
            assert "model_file" in about and "mlx_vlm_prune 0." in about
            assert len(text.splitlines()) < 50
    if subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True).returncode:
        pytest.skip("ruff is not installed")
    rules = ["--select", "E,W,F,I,B,UP,SIM,RUF", "--ignore", "RUF001,RUF002,RUF003"]
    for words in (["check", *rules], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--isolated", "--line-length", "100"]
        done = subprocess.run([*command, *files], cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]


def test_what_no_folder_could_tell_before_is_one_sentence(home):
    with pytest.raises(UserError, match="cls_attention: layer is 9; there are layers 0 to 2"):
        pruned_model(home, "llava", "cls_attention:layer=9", 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_that_has_fewer_tokens_than_the_folder_keeps_has_them_all(home, full, kind):
    model = pruned_model(home, kind, "norm", None, 99)
    answered = answer(kind, model, inputs_of(kind, model, max_images(kind)))
    assert_same(answered, full[kind])
    assert model.pruning_report.kept == model.pruning_report.total > 0


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_a_tower_that_gives_nan_is_refused_in_one_sentence(home, tmp_path, kind):
    model = KINDS[kind].make()
    model.update(
        tree_map_with_path(
            lambda path, a: a * mx.nan if path.startswith("vision_tower") else a,
            model.parameters(),
        )
    )
    (tmp_path / kind).mkdir()
    into_folders.save(model, tmp_path / kind, config_of(model))
    broken = pruned_model(tmp_path, kind, "divprune", 0.5)
    with pytest.raises(UserError, match="the vision tower gave NaN or infinite features"):
        answer(kind, broken, inputs_of(kind, broken, 1))


def test_a_quantised_folder_answers_pruned(tmp_path):
    kind, model = "qwen2_5_vl", KINDS["qwen2_5_vl"].make()
    nn.quantize(model.language_model, group_size=32, bits=4)
    how = {"group_size": 32, "bits": 4, "mode": "affine"}
    (tmp_path / kind).mkdir()
    into_folders.save(model, tmp_path / kind, config_of(model) | {"quantization": how})
    fewer, whole = pruned_model(tmp_path, kind, "divprune", 0.5), loaded(tmp_path / kind)
    inputs = inputs_of(kind, whole, 2)
    layer = fewer.language_model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.QuantizedLinear)
    assert_same(answer(kind, fewer, inputs), ours(whole, inputs, "divprune", 0.5, None))
    assert TEXT["hidden_size"] % 32 == 0


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_stock_command_line_answers_as_ours(tmp_path, kind, capsys, monkeypatch):
    from mlx_vlm.generate.cli import main

    source = host_folders.checkpoint(kind, tmp_path)
    picture = host_folders.picture(tmp_path, "a.png", 120, 90)
    prune_into(source, tmp_path / "pruned", "divprune", 0.25, None)
    words = ["--model", str(tmp_path / "pruned"), "--image", str(picture), "--prompt", "w7 w9"]
    words += ["--max-tokens", "5", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["mlx_vlm.generate", *words])
    main()
    answered = capsys.readouterr().out
    expected = generate(
        *load(source), "w7 w9", image=picture, pruner="divprune", keep_ratio=0.25, max_tokens=5
    )
    assert expected.visual_tokens_kept < expected.visual_tokens
    assert expected.text.strip() and expected.text.strip() in answered


def test_our_own_tools_say_which_folder_to_give_them(home):
    for kind in ("llava", "qwen3_vl"):
        model, folder = (
            pruned_model(home, kind, "divprune", 1.0),
            home / f"{kind}-divprune-1.0-None",
        )
        with pytest.raises(UserError, match=r"prunes by itself \(divprune\).* and a pruner"):
            load(folder)
        with pytest.raises(UserError, match="prunes already; give the folder"):
            prune_into(folder, home / "again", "norm", 0.5, None)
        with pytest.raises(UserError, match="load the folder that"), pruned(model):
            pass


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_all_other_files_are_the_same_and_the_old_folder_is_untouched(tmp_path):
    source = host_folders.checkpoint("qwen2_5_vl", tmp_path)
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("kept")
    before = digests(source)
    written = prune_into(source, tmp_path / "pruned", "divprune", None, 5)
    after = digests(tmp_path / "pruned")
    assert digests(source) == before
    assert set(after) == set(before) | {"pruned.py"}
    assert {name for name in before if after[name] != before[name]} == {"config.json"}
    assert (written.linked, written.copied, written.vendored) == (1, len(before) - 2, 0)
    weights = "model.safetensors"
    assert (tmp_path / "pruned" / weights).stat().st_ino == (source / weights).stat().st_ino
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "pruned"))
    record = new.pop("mlx_vlm_prune")
    assert new == old | {"model_file": "pruned.py"}
    assert record == {"pruner": "divprune", "keep_tokens": 5, "version": "0.1.0"}


def test_on_a_disk_without_links_weights_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", no_links)
    source = checkpoint("gemma3", tmp_path)
    assert prune_into(source, tmp_path / "pruned", "norm", 0.5, None).linked == 0
    assert digests(source)["model.safetensors"] == digests(tmp_path / "pruned")["model.safetensors"]
