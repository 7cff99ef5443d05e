"""Promises about language models of mlx-lm's below our towers: computed and pruned right.

The oracles are transformers' own models, unpruned; pruned, the reference, which calls
transformers' layers with the rows that stay and their positions; our own decoder; and the prompt
read again without a cache.

Shapes: I images, L rows, V words.
"""

import importlib

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")


from mlx_vlm_prune import load
from mlx_vlm_prune.checkpoints.backbones import text_config
from mlx_vlm_prune.checkpoints.config import MlxLmConfig
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.models.language.mlx_lm import MlxLm
from mlx_vlm_prune.planning.operations import count
from mlx_vlm_prune.pruners import METHODS, Stage, plan
from torch_ref.models.loading import load_llava

from . import backbones, llava
from .backbones import KINDS, SCANS, theirs
from .llava import N
from .pruner_cases import close
from .test_choices import trace
from .test_llava import as_mx, ours, pixels
from .test_llava import theirs as whole
from .test_model import POLICIES, K, Replaying, steps_of

CPU = torch.device("cpu")
IN_DECODER = [n for n, m in METHODS.items() if m.stage is Stage.DECODER and n != "twig"]
CHAINS = [
    "norm", "visionzip+fastv", "cls_attention+restore", "tome:r=2", "fastv+restore",
    "norm+restore:published",
]  # fmt: skip
SCANNED = ["v2drop", "vtw", "norm", "tome:r=2", "visionzip+v2drop"]  # what a Mamba can do
ABLE = [(kind, spec) for kind in KINDS if kind not in SCANS for spec in (*IN_DECODER, *CHAINS)]
ABLE += [(kind, spec) for kind in SCANS for spec in SCANNED]
UNCALIBRATED = [(kind, spec) for kind, spec in ABLE if "published" not in spec]
CUT = [(kind, spec) for kind, spec in ABLE if "fastv" in spec or spec in IN_DECODER]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return backbones.loader(tmp_path_factory.mktemp)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(kind, models):
    trio, prompt, pixel_values = models(kind), llava.prompt(2), pixels(2)
    expected = theirs(trio.theirs, prompt, pixel_values)
    if kind not in SCANS:
        np.testing.assert_array_equal(expected, whole(trio.theirs, prompt, pixel_values))
    assert np.abs(expected).max() > 0.5
    close(ours(trio.ours, prompt, pixel_values), expected)
    with torch.no_grad():
        close(trio.reference.logits([prompt], pixel_values)[0].numpy(), expected)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "spec"), ABLE)
def test_every_method_prunes_as_in_transformers_layers(kind, spec, policy, models):
    trio, prompts, pixel_values = models(kind), [llava.prompt(2), llava.prompt(1)], pixels(3)
    chain, steps = plan(spec), steps_of(trio, spec, K)
    before = trio.ours(prompts, as_mx(pixel_values), chain, K, policy, last_only=False)
    with torch.no_grad():
        expected = trio.reference.logits(prompts, pixel_values, steps, positions=policy).numpy()
    left = before.trace.steps[-1].reductions[0].slots
    assert left < N
    for b, prompt in enumerate(prompts):
        length = len(prompt.ids) - len(prompt.runs) * (N - left)
        close(np.array(before.logits_BLV)[b, -length:], expected[b, -length:])


@pytest.mark.parametrize(("kind", "spec"), [pair for pair in CUT if pair[0] not in SCANS])
def test_rows_that_stand_where_a_compaction_puts_them_give_other_logits(
    kind, spec, models, monkeypatch
):
    """The check can fail: positions that count the rows of a layer, where kept ones are meant."""
    stock = MlxLm.run

    def run(self, numbers, x_BLD, positions_BL, cache, **options):
        counted = mx.broadcast_to(mx.arange(x_BLD.shape[1]), positions_BL.shape)
        return stock(self, numbers, x_BLD, counted, cache, **options)

    monkeypatch.setattr(MlxLm, "run", run)
    trio, prompt, pixel_values = models(kind), llava.prompt(1), pixels(1)
    before = trio.ours([prompt], as_mx(pixel_values), plan(spec), K, "keep", last_only=False)
    with torch.no_grad():
        expected = trio.reference.logits([prompt], pixel_values, steps_of(trio, spec, K)).numpy()
    L = before.logits_BLV.shape[1]
    with pytest.raises(AssertionError):
        close(np.array(before.logits_BLV)[0, -3:], expected[0, -L:][-3:])


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_stays_near_the_reference(kind, tmp_path):
    """The reference has the same rounded weights and computes in float32."""
    folder = backbones.write(kind, tmp_path / "hf", dtype=torch.float16)
    model, _ = load(folder, dtype="float16")
    prompt, pixel_values = llava.prompt(2), pixels(2).half().float()
    before = model(
        [prompt], as_mx(pixel_values).astype(mx.float16), plan("uniform"), K, last_only=False
    )
    assert before.logits_BLV.dtype == mx.float16
    with torch.no_grad():
        expected = load_llava(folder, CPU).logits([prompt], pixel_values, "uniform", K)[0].numpy()
    got = np.array(before.logits_BLV.astype(mx.float32))[0]
    assert np.abs(got - expected).max() <= 5e-3 * np.abs(expected).max()


@pytest.mark.parametrize("kind", SCANS)
def test_positions_are_nothing_to_a_mamba(kind, models):
    trio, prompt, pixel_values = models(kind), llava.prompt(1), pixels(1)
    kept, counted = (
        trio.ours(
            [prompt], as_mx(pixel_values), plan("v2drop"), K, policy, last_only=False
        ).logits_BLV
        for policy in POLICIES
    )
    assert mx.array_equal(kept, counted)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("kind", "spec"), [*UNCALIBRATED, *((kind, "none") for kind in KINDS)])
def test_cached_decoding_equals_reading_again_without_a_cache(kind, spec, policy, models):
    trio, prompt, tokens = models(kind), llava.prompt(2), [8, 13, 21, 9]
    budget, chain, pixel_values = (
        N if spec == "none" else K,
        Replaying(trio, spec),
        as_mx(pixels(2)),
    )
    before = trio.ours([prompt], pixel_values, chain.pipeline, budget, policy, last_only=False)
    chain.again = True
    longer = Prompt([*prompt.ids, *tokens], prompt.runs)
    after = trio.ours([longer], pixel_values, chain.pipeline, budget, policy, last_only=False)
    for i, token in enumerate(tokens):
        got = before.step(mx.array([[token]]))
        close(np.array(got)[0, 0], np.array(after.logits_BLV)[0, i - len(tokens)])


@pytest.mark.parametrize(("kind", "spec"), ABLE)
def test_keeping_all_gives_the_unpruned_bits(kind, spec, models):
    model, prompt, pixel_values = models(kind).ours, [llava.prompt()], as_mx(pixels())
    full = model(prompt, pixel_values, plan("none"), N).logits_BLV
    assert mx.array_equal(model(prompt, pixel_values, plan(spec), N).logits_BLV, full)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_one_prompt_at_a_time_while_decoding_too(kind, models):
    model, prompts, pixel_values = (
        models(kind).ours,
        [llava.prompt(2), llava.prompt(1)],
        as_mx(pixels(3)),
    )
    together, tokens, image = model(prompts, pixel_values, plan("v2drop"), K), [9, 12], 0
    each = []
    for prompt in prompts:
        pixels_of_prompt, image = (
            pixel_values[image : image + len(prompt.runs)],
            image + len(prompt.runs),
        )
        each.append(model([prompt], pixels_of_prompt, plan("v2drop"), K))
    close(np.array(together.logits_BLV), np.concatenate([np.array(e.logits_BLV) for e in each]))
    for token in tokens:
        logits = together.step(mx.full((2, 1), token))
        for b, alone in enumerate(each):
            expected = alone.step(mx.full((1, 1), token))
            close(np.array(logits)[b], np.array(expected)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_prompt_read_in_pieces_gives_the_same_as_at_once(kind, models, monkeypatch):
    model, prompts, pixel_values = (
        models(kind).ours,
        [llava.prompt(2), llava.prompt(1)],
        as_mx(pixels(3)),
    )
    expected = np.array(model(prompts, pixel_values, plan("v2drop"), K).logits_BLV)
    monkeypatch.setattr("mlx_vlm_prune.models.layers.PREFILL_STEP_SIZE", 6)
    close(np.array(model(prompts, pixel_values, plan("v2drop"), K).logits_BLV), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_batch_returns_to_the_host_before_the_first_logits(kind, models, monkeypatch):
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)  # of a Mamba, which waits for nothing
    model, prompts = models(kind).ours, [llava.prompt(2), llava.prompt(1)]

    def logits_BV(pixels_IHW3: mx.array) -> mx.array:
        return model(prompts, pixels_IHW3, plan("visionzip+v2drop"), K).logits_BV

    trace(model, logits_BV, as_mx(pixels(3)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gemma"])
def test_words_alone_get_the_logits_of_mlx_lms_own_model(kind, models):
    """But Gemma, which mlx-lm computes with another GELU than it was trained with."""
    language, ids = models(kind).ours.language, [5, 9, 30, 12, 7, 8]
    config = language.config.text_config
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    more = {"time_step_limit": (0.0, float("inf"))}  # a Mamba-2's, which others do not read
    stock = module.Model(module.ModelArgs.from_dict({**config, **more}))
    weights = dict(tree_flatten(language.parameters()))
    if kind == "phi":
        weights["lm_head.bias"] = mx.zeros(language.config.vocab_size)
    stock.load_weights(list(weights.items()))
    got = models(kind).ours([Prompt(ids, [])], None, plan("none"), N, last_only=False)
    close(np.array(got.logits_BLV), np.array(stock(mx.array([ids]))))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", IN_DECODER)
@pytest.mark.parametrize("kind", ["vicuna", "qwen2 and siglip"])
def test_mlx_lms_llama_and_qwen2_prune_as_our_own_decoder(kind, spec, policy, tmp_path):
    """The same weights through either."""
    stock = llava.random_model(kind)
    model, _ = load(llava.write(stock, tmp_path / "hf"), dtype="float32")
    prompts, pixel_values = [llava.prompt(2), llava.prompt(1)], as_mx(pixels(3))
    expected = model(prompts, pixel_values, plan(spec), K, policy, last_only=False)
    text = stock.config.text_config
    config = text_config(text.to_dict(), {}, tmp_path, has_head=True, has_head_bias=False)
    parts = dict(tree_flatten(model.language.parameters()))
    model.language = MlxLm(MlxLmConfig.from_dict(config))
    renamed = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in parts.items()}
    model.language.load_weights(list(renamed.items()))
    got = model(prompts, pixel_values, plan(spec), K, policy, last_only=False)
    for one, other in zip(got.trace.steps, expected.trace.steps, strict=True):
        pairs = zip(one.reductions, other.reductions, strict=True)
        assert all(mx.array_equal(a.index_BK, b.index_BK) for a, b in pairs)
    L = expected.rows[1]
    close(np.array(got.logits_BLV)[:, -L:], np.array(expected.logits_BLV)[:, -L:])


@pytest.mark.parametrize("kind", KINDS)
def test_counted_is_every_matrix_of_a_layer(kind, models):
    model = models(kind).ours
    parts = tree_flatten(model.language.layers[1].wrapped.parameters())
    assert model.config.text.layer_size == sum(p.size for _, p in parts if p.ndim > 1)
    work = count(model.config, 6, plan("v2drop"), K)
    full = count(model.config, 6, plan("none"), N)
    assert work.prefill < full.prefill and work.vision == full.vision
