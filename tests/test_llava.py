"""Promises about LLaVA-style models: computed and pruned right.

The oracles are transformers' LlavaForConditionalGeneration, the reference, and the prompt
read again without a cache.

Shapes: I images, L rows, V words.
"""

import json
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_vlm_prune import load
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.pruners import plan
from torch_ref.models.loading import load_llava

from . import llava, tiny
from .llava import KINDS, SIDE, N
from .pruner_cases import close
from .test_model import CHOOSING, POLICIES, SPECS, K, Replaying, steps_of

CPU = torch.device("cpu")


def pixels(images: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def as_mx(pixels_I3HW: torch.Tensor) -> mx.array:
    return mx.array(pixels_I3HW.permute(0, 2, 3, 1).numpy())


def theirs(model, prompt: Prompt, pixels_I3HW: torch.Tensor) -> np.ndarray:
    """Logits of transformers, (L, V)."""
    with torch.no_grad():
        return (
            model(input_ids=torch.tensor([prompt.ids]), pixel_values=pixels_I3HW).logits[0].numpy()
        )


def ours(model, prompt: Prompt, pixels_I3HW: torch.Tensor) -> np.ndarray:
    pixels_I3HW = as_mx(pixels_I3HW)
    return np.array(model([prompt], pixels_I3HW, plan("none"), N, last_only=False).logits_BLV)[0]


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """The same random weights in transformers, in the reference, and in MLX; the latter two
    were taught the learned methods."""
    folder = llava.write(llava.random_model(), tmp_path_factory.mktemp("llava"))
    reference = tiny.taught(load_llava(folder, CPU))
    tiny.write_learned(reference, folder)
    model, processor = load(folder, dtype="float32")
    return SimpleNamespace(
        theirs=llava.random_model(),
        reference=reference,
        ours=model,
        folder=folder,
        processor=processor,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers(kind, tmp_path):
    model = llava.random_model(kind)
    folder = llava.write(model, tmp_path / "hf")
    prompt, pixels_I3HW = llava.prompt(2), pixels(2)
    expected = theirs(model, prompt, pixels_I3HW)
    assert np.abs(expected).max() > 0.5
    close(ours(load(folder, dtype="float32")[0], prompt, pixels_I3HW), expected)
    with torch.no_grad():
        close(load_llava(folder, CPU).logits([prompt], pixels_I3HW)[0].numpy(), expected)


def test_a_model_that_reads_another_layer_gives_other_logits(trio, tmp_path):
    """The check can fail: the last layer's features, where the last but one's are meant."""
    model = llava.random_model()
    folder = llava.write(model, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": -1}))
    other, _ = load(folder, dtype="float32")
    with pytest.raises(AssertionError):
        close(ours(other, llava.prompt(), pixels()), theirs(model, llava.prompt(), pixels()))


def test_greedy_tokens_equal_those_of_transformers(trio):
    prompt, pixels_I3HW = llava.prompt(), pixels()
    model, tokens, ids = trio.ours, [], torch.tensor([prompt.ids])
    with torch.no_grad():
        expected = trio.theirs.generate(
            input_ids=ids,
            pixel_values=pixels_I3HW,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=-1,
        )[0, len(prompt.ids) :].tolist()
    before = model([prompt], as_mx(pixels_I3HW), plan("none"), N)
    logits_BLV, position_B1 = before.logits_BLV, before.next_B1
    for _ in range(12):
        tokens.append(int(mx.argmax(logits_BLV[0, -1])))
        logits_BLV = before.step(mx.array([[tokens[-1]]]))
        position_B1 = position_B1 + 1
    assert len(set(expected)) > 2, "an answer that repeats itself would prove little"
    assert tokens == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_every_method_prunes_it_as_the_reference_does(trio, spec, policy):
    rows, pixels_I3HW = [llava.prompt(2), llava.prompt(1)], pixels(3)
    chain, steps = plan(spec, trio.ours.learned), steps_of(trio, spec, K)
    before = trio.ours(rows, as_mx(pixels_I3HW), chain, K, policy, last_only=False)
    with torch.no_grad():
        expected = trio.reference.logits(rows, pixels_I3HW, steps, positions=policy).numpy()
    left = before.trace.steps[-1].reductions[0].slots
    assert left < N
    for b, row in enumerate(rows):
        length = len(row.ids) - len(row.runs) * (N - left)
        close(np.array(before.logits_BLV)[b, -length:], expected[b, -length:])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("spec", SPECS)
def test_cached_decoding_equals_reading_again_without_a_cache(trio, spec, policy):
    chain, row, tokens = Replaying(trio, spec), llava.prompt(2), [8, 13, 21, 9]
    pixels_I3HW = as_mx(pixels(2))
    before = trio.ours([row], pixels_I3HW, chain.pipeline, K, policy, last_only=False)
    chain.again = True
    whole = Prompt([*row.ids, *tokens], row.runs)
    after = trio.ours([whole], pixels_I3HW, chain.pipeline, K, policy, last_only=False)
    position_B1 = before.next_B1
    for i, token in enumerate(tokens):
        step_logits = before.step(mx.array([[token]]))
        position_B1 = position_B1 + 1
        close(np.array(step_logits)[0, 0], np.array(after.logits_BLV)[0, i - len(tokens)])


@pytest.mark.parametrize("spec", CHOOSING)
def test_keeping_all_gives_the_unpruned_bits(trio, spec):
    full = trio.ours([llava.prompt()], as_mx(pixels()), plan("none"), N).logits_BLV
    chain = plan(spec, trio.ours.learned)
    kept = trio.ours([llava.prompt()], as_mx(pixels()), chain, N).logits_BLV
    assert mx.array_equal(kept, full)
