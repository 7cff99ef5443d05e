"""Promises of `convert prune-into`: mlx-vlm alone answers from the folder as we would.

Shapes: T tokens, V words.
"""

import ast
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from convert.describe import describe
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.elsewhere import RECORD
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.into.folder import prune_into
from mlx_vlm_prune.hosts.mlx_vlm import family_of, see, shares, tell
from mlx_vlm_prune.hosts.refusals import check
from mlx_vlm_prune.hosts.views import Inputs
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.stream import budget

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed")
from . import host_folders
from .host_models import KINDS, TEXT
from .into_folders import (
    Job,
    answer,
    checkpoint,
    config_of,
    fastvlm_sizes,
    inputs_of,
    run,
    save,
    save_prompt,
)
from .test_hosts import decoded

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
EVERYWHERE = ["random:seed=3", "uniform", "avgpool", "norm", "similarity", "divprune", "apet"]
WITH_CLS = ["cls_attention", "vispruner", "holov", "scope", "cls_attention:layer=0"]
CLS = ("llava", "llava_next", "internvl_chat")
QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FREE = [(k, s) for k in KINDS for s in EVERYWHERE + (WITH_CLS if k in CLS else [])]
LEANING = [(k, s) for k in KINDS for s in ("received_attention", "cdpruner", "norm+divprune")]
BUDGETS = {"ratio": (0.5, None), "tokens": (None, 3)}


def most(kind: str) -> int:
    return len(KINDS[kind].tiles)


def name_of(*parts: str) -> str:
    return "-".join(parts).translate(str.maketrans(":=+", "___"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny checkpoint of every family, and its prompts."""
    folder = tmp_path_factory.mktemp("into")
    for kind in KINDS:
        checkpoint(kind, folder)
        model = KINDS[kind].make()
        for images in range(1, most(kind) + 1):
            prompt = folder / f"{kind}-{images}.safetensors"
            save_prompt(prompt, kind, inputs_of(kind, model, images))
        words = Inputs([3, 9, 4], mx.ones((1, 3), mx.int32))
        save_prompt(folder / f"{kind}-0.safetensors", kind, words)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_says_whose_a_folder_is_and_what_prunes_it(kind, home, tmp_path):
    bits = {"quantization": {"bits": 4, "group_size": 64}}
    source = shutil.copytree(home / kind, tmp_path / "source")
    told = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(told | bits))
    before = describe(source)
    assert f"{told['model_type']}, for mlx-vlm, if it knows this kind: nothing is" in before
    assert f"layers of {TEXT['hidden_size']}" in before and "4 bits, groups of 64" in before
    assert f"generate --model {source} --pruner NAME" in before and "F32" in before
    for at, (ratio, tokens, kept) in enumerate([(0.5, None, "0.5"), (None, 3, "3")]):
        prune_into(source, tmp_path / f"pruned{at}", "norm", ratio, tokens)
        after = describe(tmp_path / f"pruned{at}")
        assert f"norm, which keeps {kept} of an image's visual tokens" in after
        assert "pruned.py, whenever mlx-vlm loads this folder" in after
    for made in ({}, 5, {"pruner": "norm"}):
        (source / "config.json").write_text(json.dumps({**told, "quantization": {}, RECORD: made}))
        after = describe(source)
        assert "the record of how is damaged" in after
        assert "None" not in after and "quantized" not in after and "executes" not in after


@pytest.fixture(scope="module")
def alone(home):
    """All that is asked of mlx-vlm where nothing of ours can be imported."""
    jobs = []
    for kind, spec in FREE:
        for called, (ratio, tokens) in BUDGETS.items():
            name = name_of(kind, spec, called)
            prune_into(home / kind, home / name, spec, ratio, tokens)
            jobs.append(Job(f"{name}-out", name, f"{kind}-{most(kind)}"))
    for kind in KINDS:
        prune_into(home / kind, home / f"{kind}-full", "divprune", 1.0, None)
        for images in range(most(kind) + 1):
            jobs.append(Job(f"{kind}-full-{images}", f"{kind}-full", f"{kind}-{images}"))
            jobs.append(Job(f"{kind}-stock-{images}", kind, f"{kind}-{images}"))
        jobs.append(Job(f"{kind}-chunked", name_of(kind, "divprune", "ratio"), f"{kind}-1", 3))
        jobs.append(Job(f"{kind}-whole", name_of(kind, "divprune", "ratio"), f"{kind}-1", None))
        for images in range(1, most(kind) + 1):
            folder = name_of(kind, "divprune", "ratio")
            jobs.append(Job(f"{kind}-alone-{images}", folder, f"{kind}-{images}"))
    for kind in QWEN:
        wrong(home / name_of(kind, "divprune", "ratio"), home / f"{kind}-wrong")
        jobs.append(Job(f"{kind}-wrong-out", f"{kind}-wrong", f"{kind}-{most(kind)}"))
    done = run(home, jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


@pytest.fixture(scope="module")
def leaning(home):
    """What needs our package, where it is at hand."""
    jobs = []
    for kind, spec in LEANING:
        name = name_of(kind, spec, "leaning")
        prune_into(home / kind, home / name, spec, 0.5, None)
        jobs.append(Job(f"{name}-out", name, f"{kind}-{most(kind)}"))
    done = run(home, jobs, with_us=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return home


def wrong(folder: Path, target: Path) -> None:
    """The same, decoding on from where the short prompt ends."""
    shutil.copytree(folder, target)
    text = (folder / "pruned.py").read_text()
    assert text.count(" + len(gone)") == 1
    (target / "pruned.py").write_text(text.replace(" + len(gone)", ""))


def ours(model, inputs: Inputs, spec: str, ratio, tokens) -> tuple[list[int], np.ndarray]:
    """Tokens and odds (T, V) by the host path."""
    pipeline = plan(spec)
    policy = check(model, family_of(model), pipeline, None)
    views = see(model, inputs, pipeline, lambda name, value=None: value)
    budgets = []
    for image in range(1 + max(view.image for view in views)):
        sizes = [v.signals.x_BND.shape[1] for v in views if v.image == image]
        budgets += shares(budget(sum(sizes), ratio, tokens, pipeline), sizes)
    said = tell(model, inputs, views, pipeline, budgets, policy, lambda name, value=None: value)
    return decoded(model, said.arguments)


def same(found, expected) -> None:
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def models(home):
    """The stock models of the folders, as mlx-vlm loads them."""
    from mlx_vlm.utils import load_model

    with fastvlm_sizes():
        return {kind: load_model(home / kind) for kind in KINDS}


@pytest.mark.parametrize("called", BUDGETS)
@pytest.mark.parametrize(("kind", "spec"), FREE)
def test_without_us_mlx_vlm_answers_as_our_own_path_does(alone, models, kind, spec, called):
    inputs = inputs_of(kind, models[kind], most(kind))
    found = answer(alone, f"{name_of(kind, spec, called)}-out")
    same(found, ours(models[kind], inputs, spec, *BUDGETS[called]))
    full = answer(alone, f"{kind}-stock-{most(kind)}")[1]
    assert np.abs(found[1][0] - full[0]).max() > 1e-3  # so something was pruned


@pytest.mark.parametrize(("kind", "spec"), LEANING)
def test_with_us_any_method_answers_as_our_own_path_does(leaning, models, kind, spec):
    inputs = inputs_of(kind, models[kind], most(kind))
    found = answer(leaning, f"{name_of(kind, spec, 'leaning')}-out")
    same(found, ours(models[kind], inputs, spec, 0.5, None))


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_tokens_or_no_image_it_is_the_stock_model_bit_for_bit(alone, kind):
    for images in range(most(kind) + 1):
        tokens, odds = answer(alone, f"{kind}-full-{images}")
        expected, expected_odds = answer(alone, f"{kind}-stock-{images}")
        assert tokens == expected
        np.testing.assert_array_equal(odds, expected_odds)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_read_in_chunks_gives_the_same(alone, kind):
    same(answer(alone, f"{kind}-chunked"), answer(alone, f"{kind}-whole"))


@pytest.mark.parametrize("kind", QWEN)
def test_wrong_positions_would_not_pass(alone, models, kind):
    found = answer(alone, f"{kind}-wrong-out")[1]
    right = answer(alone, f"{name_of(kind, 'divprune', 'ratio')}-out")[1]
    np.testing.assert_allclose(found[0], right[0], atol=1e-5)  # the prompt is right
    assert np.abs(found[1] - right[1]).max() > 1e-3  # what follows stands elsewhere


@pytest.mark.parametrize(("kind", "spec"), [*FREE, *LEANING])
def test_the_file_is_well_written_and_says_what_it_is(alone, leaning, kind, spec):
    is_free = (kind, spec) in FREE
    folder = name_of(kind, spec, "ratio" if is_free else "leaning")
    file = alone / folder / "pruned.py"
    text = file.read_text()
    tree = ast.parse(text)
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert any(name.startswith("mlx_vlm_prune") for name in imported) is not is_free
    said = " ".join((ast.get_docstring(tree) or "").split())
    assert spec in said and "model_file" in said and "mlx_vlm_prune 0." in said
    own = plan(spec).steps[0].method.doc.splitlines()[0]
    assert own in said or not is_free
    assert len(text.splitlines()) < 400


def test_ruff_has_nothing_to_say_about_any_file(alone, leaning):
    if subprocess.run([sys.executable, "-m", "ruff", "--version"], capture_output=True).returncode:
        pytest.skip("ruff is not installed")
    files = [str(file) for file in alone.glob("*/pruned.py")]
    assert len(files) > len(FREE)
    rules = ["--select", "E,W,F,I,B,UP,SIM,RUF", "--ignore", "RUF001,RUF002,RUF003"]
    for words in (["check", *rules], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *words, "--isolated", "--line-length", "100"]
        done = subprocess.run([*command, *files], cwd=alone, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]


def test_one_prompt_at_a_time_is_read():
    from mlx_vlm_prune.hosts.into.parts import one_prompt

    assert one_prompt(mx.array([[3, 9]])) == [3, 9]
    with pytest.raises(ValueError, match="one prompt with images at a time, not 2"):
        one_prompt(mx.zeros((2, 3), mx.int32))


@pytest.mark.parametrize(
    ("spec", "tokens", "said"),
    [
        ("norm", 17, "pruned.py cannot keep 17 visual tokens of an image that has 16"),
        ("cls_attention:layer=9", 4, "LAYER of pruned.py is 9; there are layers 0 to 2"),
    ],
)
def test_what_no_picture_could_tell_before_is_one_sentence_at_the_end(home, spec, tokens, said):
    prune_into(home / "llava", home / f"late-{tokens}", spec, None, tokens)
    done = run(home, [Job("late-out", f"late-{tokens}", "llava-1")])
    assert done.returncode and done.stderr.splitlines()[-1] == f"ValueError: {said}"


def test_a_quantised_folder_answers_pruned(home):
    from mlx_vlm.utils import load_model

    model = KINDS["qwen2_5_vl"].make()
    nn.quantize(model.language_model, group_size=32, bits=4)
    how = {"group_size": 32, "bits": 4, "mode": "affine"}
    (home / "fewer-bits").mkdir()
    save(model, home / "fewer-bits", config_of(model) | {"quantization": how})
    prune_into(home / "fewer-bits", home / "fewer-bits-pruned", "divprune", 0.5, None)
    done = run(home, [Job("fewer-bits-out", "fewer-bits-pruned", "qwen2_5_vl-2")])
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = load_model(home / "fewer-bits")
    inputs = inputs_of("qwen2_5_vl", loaded, 2)
    same(answer(home, "fewer-bits-out"), ours(loaded, inputs, "divprune", 0.5, None))
    assert TEXT["hidden_size"] % 32 == 0


STOCK_COMMAND = """
import sys
sys.modules["mlx_vlm_prune"] = sys.modules["convert"] = None
from mlx_vlm.generate.cli import main
main()
"""


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_the_stock_command_line_answers_as_ours(tmp_path, kind, capsys):
    from mlx_vlm_prune import generate

    source = host_folders.checkpoint(kind, tmp_path)
    picture = host_folders.picture(tmp_path, "a.png", 120, 90)
    prune_into(source, tmp_path / "pruned", "divprune", 0.25, None)
    told = ["--model", str(tmp_path / "pruned"), "--image", str(picture), "--prompt", "w7 w9"]
    command = [sys.executable, "-c", STOCK_COMMAND, *told, "--max-tokens", "5"]
    done = subprocess.run([*command, "--temperature", "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model, processor = load(source)
    expected = generate(
        model, processor, "w7 w9", image=picture, pruner="divprune", keep_ratio=0.25, max_tokens=5
    )
    assert expected.visual_tokens_kept < expected.visual_tokens
    assert expected.text.strip() and expected.text.strip() in done.stdout


def test_our_own_tools_say_which_folder_to_give_them(alone):
    for kind in ("llava", "qwen3_vl"):
        with pytest.raises(UserError, match=r"prunes by itself \(divprune\).* --pruner"):
            load(alone / f"{kind}-full")
        with pytest.raises(UserError, match="prunes already; give the folder"):
            prune_into(alone / f"{kind}-full", alone / "again", "norm", 0.5, None)


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_all_other_files_are_the_same_and_the_old_folder_is_untouched(tmp_path):
    source = host_folders.checkpoint("qwen2_5_vl", tmp_path)
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("kept")
    before = digests(source)
    made = prune_into(source, tmp_path / "pruned", "divprune", None, 5)
    after = digests(tmp_path / "pruned")
    assert digests(source) == before
    assert set(after) == set(before) | {"pruned.py"}
    assert {name for name in before if after[name] != before[name]} == {"config.json"}
    assert (made.linked, made.copied) == (1, len(before) - 2)
    weights = "model.safetensors"
    assert (tmp_path / "pruned" / weights).stat().st_ino == (source / weights).stat().st_ino
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "pruned"))
    record = new.pop("mlx_vlm_prune")
    assert new == old | {"model_file": "pruned.py"}
    assert record == {"pruner": "divprune", "keep_tokens": 5, "version": "0.1.0"}


def test_on_a_disk_without_links_weights_are_copied(tmp_path, monkeypatch):
    from mlx_vlm_prune.hosts.into import folder

    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder.os, "link", no_links)
    source = checkpoint("gemma3", tmp_path)
    assert prune_into(source, tmp_path / "pruned", "norm", 0.5, None).linked == 0
    assert digests(source)["model.safetensors"] == digests(tmp_path / "pruned")["model.safetensors"]
