"""Promises about what cannot be computed or pruned with a language model of mlx-lm's."""

import json
import shutil
import sys
from dataclasses import replace

import pytest

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")

from convert.__main__ import main
from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.pruners import METHODS, Pipeline, Stage, plan

from . import backbones, llava
from .test_llava import as_mx, pixels
from .test_model import K

IN_DECODER = [n for n, m in METHODS.items() if m.stage is Stage.DECODER and n != "twig"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return backbones.loader(tmp_path_factory.mktemp)


@pytest.mark.parametrize("kind", backbones.SCANS)
@pytest.mark.parametrize("spec", [n for n in IN_DECODER if n not in ("v2drop", "vtw")])
def test_methods_that_read_attention_are_refused_by_a_mamba_by_name(spec, kind, models):
    model, prompt, pixel_values = models(kind).ours, [llava.prompt()], as_mx(pixels())
    with pytest.raises(UserError, match=f"{spec} cannot prune a {kind}: it reads attention"):
        model(prompt, pixel_values, plan(spec), K)


def test_what_adds_to_attention_is_refused_by_a_mamba_by_name(models):
    model, prompt, pixel_values = models("mamba").ours, [llava.prompt()], as_mx(pixels())
    with pytest.raises(UserError, match="restore cannot work in a mamba: it adds to the atten"):
        model(prompt, pixel_values, plan("norm+restore"), K)


def test_a_twig_is_refused_where_mlx_lm_computes_the_base(models):
    step = plan("fastv").steps[0]
    twig = Pipeline((replace(step, name="twig"),))
    with pytest.raises(UserError, match="twig cannot prune a phi of mlx-lm's"):
        models("phi").ours([llava.prompt()], as_mx(pixels()), twig, K)


def _in(**values):
    return lambda config: {**config, "text_config": {**config["text_config"], **values}}


REFUSED = {
    "qk_layernorm of phi is True; mlx-lm has False": ("phi", _in(qk_layernorm=True)),
    "hidden_act of phi is 'gelu'; mlx-lm has 'gelu_new'": ("phi", _in(hidden_act="gelu")),
    "layer_norm_epsilon of mamba is 1e-06": ("mamba", _in(layer_norm_epsilon=1e-6)),
    r"time_step_limit is \[0.0, 0.1\]; only": ("mamba2", _in(time_step_limit=[0.0, 0.1])),
    "4 heads of 24 do not make a hidden_size of 64": ("phi", _in(head_dim=24)),
    r"rope_parameters of gemma is .* which is not supported": (
        "gemma", _in(rope_parameters=backbones.TURNS),
    ),
    r"rope_parameters of llama is .* which is not supported": (
        "llama", _in(rope_parameters={**backbones.TURNS, "factor": "many"}),
    ),
    r"is \(96, 64\); \(97, 64\) is expected": ("qwen3", _in(intermediate_size=97)),
    "vocab_size is 0, not a whole number": ("gemma", _in(vocab_size=0)),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_is_computed_otherwise_is_refused_by_name(sentence, models, tmp_path):
    kind, change = REFUSED[sentence]
    folder = shutil.copytree(models(kind).folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    with pytest.raises(UserError, match=sentence):
        load(folder)


def test_a_damaged_config_of_ours_is_refused_in_a_sentence(models, tmp_path, capsys):
    main(["to-mlx", str(models("llama").folder), str(tmp_path / "mlx")])
    file = tmp_path / "mlx" / "config.json"
    config = json.loads(file.read_text())
    damages = {
        "mlx-lm's 'gpt2' is none of llama": {"model_type": "gpt2"},
        "head_dim is -2, not a whole number": {"head_dim": -2},
        "heads do not divide evenly": {"head_dim": 23},
        "rms_norm_eps is 'small', not a positive": {"rms_norm_eps": "small"},
        "mlp_bias is 1, not true or false": {"mlp_bias": 1},
        "rope_scaling of llama is": {"rope_scaling": {"rope_type": "llama3"}},
    }
    for sentence, damage in damages.items():
        file.write_text(json.dumps({**config, "text_config": {**config["text_config"], **damage}}))
        with pytest.raises(UserError, match=sentence):
            load(tmp_path / "mlx")


@pytest.mark.parametrize("damage", [{"n_groups": 3}, {"head_dim": 8}], ids=str)
def test_heads_of_a_mamba_2_that_do_not_fit_are_refused(damage, models, tmp_path, capsys):
    main(["to-mlx", str(models("mamba2").folder), str(tmp_path / "mlx")])
    file = tmp_path / "mlx" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "text_config": {**config["text_config"], **damage}}))
    with pytest.raises(UserError, match="which do not divide 128 evenly"):
        load(tmp_path / "mlx")


def test_without_mlx_lm_a_sentence_names_the_extra(models, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlx_lm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    sentence = r"a phi language model needs mlx-lm: .*pip install 'mlx-vlm-prune\[mlx-lm\]'"
    with pytest.raises(UserError, match=sentence):
        load(models("phi").folder)
