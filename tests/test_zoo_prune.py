"""`zoo_prune` asks the projector, where there is one to ask, and nobody else does.

Shapes: N tokens, D features.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.hosts.prompt import budgets_by_view, encode_images_and_text, prune_prompt
from mlx_vlm_prune.hosts.pruned_folder import prune_into
from mlx_vlm_prune.pruners import plan, resolve

from . import tiny
from .host_models import KINDS

SPEC = "zoo_prune:directions=5,seed=2"


def pruned_prompt(host, inputs, spec: str):
    chain = plan(spec)
    views = encode_images_and_text(host, inputs, chain)
    policy = check_pipeline(host, chain, None)
    return views, prune_prompt(
        host, inputs, views, chain, budgets_by_view(views, 0.5, None, chain), policy
    )


def sensitivity_by_loops(project, features_1ND: np.ndarray) -> np.ndarray:
    """Direction by direction and token by token, from one projection at a time."""
    moved = np.zeros((1, features_1ND.shape[1]))
    for u_D in np.random.default_rng(2).standard_normal((5, features_1ND.shape[-1])):
        u_D = 0.01 * u_D / np.linalg.norm(u_D)
        for i, x_D in enumerate(features_1ND[0]):
            ends = [mx.array((x_D + sign * u_D).astype(np.float32)[None, None]) for sign in (1, -1)]
            ahead, behind = (np.array(project(end)).astype(np.float64) for end in ends)
            moved[0, i] += np.linalg.norm(ahead - behind) / (2 * 0.01 * 5)
    return moved.astype(np.float32)


@pytest.mark.parametrize("kind", ["llava", "fastvlm", "gemma3", "smolvlm", "internvl_chat"])
def test_in_mlx_vlms_models_it_keeps_what_their_projectors_answers_say(kind):
    model = KINDS[kind].make()
    host, inputs = host_of(model), KINDS[kind].inputs(model)
    views, prompt = pruned_prompt(host, inputs, SPEC)
    for view, kept in zip(views, prompt.trace.steps[-1].reductions, strict=True):
        features_1ND = view.signals.x_BND
        moved_1N = sensitivity_by_loops(host.project, np.array(features_1ND))
        signals = view.signals.replace(
            x_BND=host.project(features_1ND), sensitivity_BN=mx.array(moved_1N)
        )
        assert resolve(SPEC)(signals, kept.slots).index_BK.tolist() == kept.index_BK.tolist()


def test_a_quantized_projector_in_bfloat16_answers_in_float32():
    model = KINDS["llava"].make()
    model.set_dtype(mx.bfloat16)
    nn.quantize(model.multi_modal_projector, group_size=32, bits=4)
    features_1ND = mx.random.normal((1, 6, model.config.vision_config.hidden_size))
    features_1ND = features_1ND.astype(mx.bfloat16)
    host, method = host_of(model), resolve("zoo_prune").method
    assert host.project(features_1ND).dtype == mx.bfloat16
    moved_1N = method.probe(host.project, features_1ND, directions=64)
    assert moved_1N.dtype == mx.float32
    model.set_dtype(mx.float32)
    exact_1N = method.probe(host.project, features_1ND, directions=64)
    np.testing.assert_allclose(np.array(moved_1N), np.array(exact_1N), rtol=0.02)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision"])
def test_without_a_projector_to_ask_it_is_refused(kind, tmp_path):
    with pytest.raises(UserError, match=f"zoo_prune cannot prune a {kind} model: .* projector"):
        check_pipeline(host_of(KINDS[kind].make()), plan("zoo_prune"), None)
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").touch()
    (source / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(UserError, match=f"zoo_prune cannot prune a {kind} model: .* projector"):
        prune_into(source, tmp_path / "target", "zoo_prune", 0.5)
    assert not (tmp_path / "target").exists()


class CountingProjector(nn.Module):
    """A projector that counts the rows it reads."""

    def __init__(self, projector) -> None:
        super().__init__()
        self.projector, self.rows = projector, [0]

    def __call__(self, x_BND: mx.array) -> mx.array:
        self.rows[0] += x_BND.shape[0] * x_BND.shape[1]
        return self.projector(x_BND)


def test_only_this_method_has_the_projector_read_more(tmp_path):
    model, _ = load(tiny.checkpoint(tiny.reference(), tmp_path), dtype="float32")
    pixels = mx.random.normal((1, 64, 64, 3))
    model.projector = counting = CountingProjector(model.projector)
    rows = {}
    for spec in ("divprune", "norm:keep=9+divprune", SPEC, f"norm:keep=9+{SPEC}"):
        counting.rows[0] = 0
        model([tiny.row("# what is that ?")], pixels, plan(spec), 5)
        rows[spec] = counting.rows[0]
    assert rows == {
        "divprune": 16, "norm:keep=9+divprune": 9, SPEC: 16 + 160, f"norm:keep=9+{SPEC}": 9 + 90,
    }  # fmt: skip


@pytest.mark.parametrize("option", ["directions=0", "directions=1001", "step=0", "seed=-1"])
def test_options_out_of_range_are_named(option):
    step = resolve(f"zoo_prune:{option}")
    with pytest.raises(UserError, match=r"zoo_prune: directions, step and seed are .* 1 to 1000"):
        step.call(step.method.probe, lambda x: x, mx.zeros((1, 4, 8)))
