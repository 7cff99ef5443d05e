"""Promises of a model of mlx-vlm's on a GPU: nothing returns to the host before the first logits.

What returns shows while MLX traces a function, as in test_choices: reading an array that depends on
the weights is an error there. Ids, masks and pixels come from the host and may be read.
"""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune import pruned
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.compatibility import check_pipeline
from mlx_vlm_prune.hosts.families import host_of
from mlx_vlm_prune.hosts.prefill import prefill_through_cuts
from mlx_vlm_prune.hosts.prompt import ImageBudget, encode_images_and_text, prune_prompt
from mlx_vlm_prune.machine.clock import end_part, request_clock
from mlx_vlm_prune.pruners import METHODS, Stage, plan

from .host_models import KINDS, cached_models
from .test_choices import RETURNS, replace_returns, trace
from .test_pruned import several

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
SPECS = [
    name
    for name, method in METHODS.items()
    if method.stage in (Stage.FEATURES, Stage.PROJECTED, Stage.DECODER)
    and not (method.learned or name == "none")
]
PACT = "how often a row stands in the cache is read once, behind the last layer"
PIXTRAL = "words stand between its placeholders, among which mlx-vlm looks for the kept ones"


@pytest.fixture(scope="module")
def models():
    return cached_models()


def first_logits(model: Any, name: str, spec: str) -> mx.array:
    """By the parts of `generate`, up to where mlx-vlm's loop goes on."""
    from mlx_vlm.models.cache import make_prompt_cache

    host, pipeline, inputs = host_of(model), plan(spec), KINDS[name].inputs(model, several(name))
    policy = check_pipeline(host, pipeline, None)
    by_view = ImageBudget(keep_ratio=0.5).by_view(pipeline)
    views = encode_images_and_text(host, inputs, pipeline, by_view)
    budgets = by_view(views)
    prompt = prune_prompt(host, inputs, views, pipeline, budgets, policy)
    prompt = prefill_through_cuts(host, prompt, pipeline, budgets, policy)
    cache, more = prompt.cache or make_prompt_cache(host.language), dict(prompt.arguments)
    ids_1l, pixels, mask = (more.pop(n, None) for n in ("input_ids", "pixel_values", "mask"))
    features = model.get_input_embeddings(ids_1l, pixels, mask=mask, **more)
    more = {n: x for n, x in (features.to_dict() | more).items() if x is not None}
    return model.language_model(ids_1l, cache=cache, **more).logits


def logits_of_pieces(model: Any, name: str, size: int) -> mx.array:
    """As mlx-vlm's `generate_step` reads a prompt: embeddings in pieces, the rest whole."""
    from mlx_vlm.models.cache import make_prompt_cache

    inputs = KINDS[name].inputs(model, several(name))
    ids_1L, cache = mx.array([inputs.ids]), make_prompt_cache(model.language_model)
    features = model.get_input_embeddings(
        ids_1L, inputs.pixels, mask=inputs.mask_1L, **inputs.extra
    )
    more = {n: x for n, x in features.to_dict().items() if x is not None}
    x_1LD, begin = more.pop("inputs_embeds"), 0
    while begin < x_1LD.shape[1]:
        rows = slice(begin, min(begin + size, max(begin + 1, x_1LD.shape[1] - 1)))
        piece = {"inputs_embeds": x_1LD[:, rows], "cache": cache, **more}
        logits = model.language_model(ids_1L[:, rows], **piece).logits
        begin = rows.stop
    return logits


@pytest.mark.parametrize("spec", SPECS)
def test_no_method_returns_to_the_host_before_the_first_logits(models, spec, monkeypatch):
    if spec in ("pact", "lookahead"):
        pytest.skip(PACT)
    returns = []

    def stand_in(*arrays: mx.array) -> list[np.ndarray]:
        returns.append(arrays)
        return [np.linspace(0, 1, a.size).reshape(a.shape) for a in arrays]

    replace_returns(monkeypatch, stand_in)
    model = models("llava")
    try:
        check_pipeline(host_of(model), plan(spec), None)
    except UserError as refusal:
        pytest.skip(str(refusal))
    trace(model, lambda: first_logits(model, "llava", spec))
    assert len(returns) == RETURNS.get(spec, 0) * len(KINDS["llava"].grids)


@pytest.mark.parametrize("name", KINDS)
def test_no_family_returns_to_the_host_before_the_first_logits(models, name):
    if name == "pixtral":
        pytest.skip(PIXTRAL)
    model = models(name)
    trace(model, lambda: first_logits(model, name, "divprune"))


@pytest.mark.parametrize("spec", ["kq_norm", "tome", "ipcv+divprune"])
@pytest.mark.parametrize("name", ["llava", "idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_no_method_inside_a_tower_returns_to_the_host_either(models, name, spec):
    model = models(name)
    trace(model, lambda: first_logits(model, name, spec))


@pytest.mark.parametrize("size", [5, 2048])
@pytest.mark.parametrize("name", KINDS)
def test_a_pruned_model_does_not_either(models, name, size, monkeypatch):
    if name == "pixtral":
        pytest.skip(PIXTRAL)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))  # of the request's clock
    model = models(name)
    with pruned(model, "divprune", keep_ratio=0.5):
        trace(model, lambda: logits_of_pieces(model, name, size))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_what_a_pruned_model_kept_is_read_behind_its_first_logits(models, name):
    model, inputs = models(name), KINDS[name].inputs(models(name))
    with pruned(model, "divprune", keep_ratio=0.5) as report:
        for _ in range(2):
            model.get_input_embeddings(mx.array([inputs.ids]), inputs.pixels, **inputs.extra)
            assert len(report._unread) == 1
    first, second = report.prompts
    assert not report._unread and first.kept_indices == second.kept_indices
    assert [len(kept) for kept in first.kept_indices] == first.kept


def test_a_tool_that_leaves_the_mask_out_is_read_by_its_embeddings(models):
    model, inputs = models("qwen2_vl"), KINDS["qwen2_vl"].inputs(models("qwen2_vl"))
    ids_1L = mx.array([inputs.ids])
    with pruned(model, "divprune", keep_ratio=0.5):
        features = model.get_input_embeddings(ids_1L, inputs.pixels, **inputs.extra)
        arguments = {n: x for n, x in features.to_dict().items() if x is not None}
        by_mask = model.language_model(ids_1L, **arguments).logits
        del arguments["attention_mask"]
        by_rows = model.language_model(ids_1L, **arguments).logits
    np.testing.assert_array_equal(np.array(by_mask), np.array(by_rows))
    assert by_mask.shape[1] < len(inputs.ids) and np.isfinite(np.array(by_mask)).all()


def test_a_request_on_a_gpu_is_not_timed_in_parts(monkeypatch):
    assert "vision" in request_clock().ms
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    clock = request_clock()
    with clock.running():
        end_part("vision", object())  # nothing that could be computed
    clock.end_part("prefill")
    timings = clock.ttft()
    assert timings["vision"] is timings["pruner"] is timings["prefill"] is None
    assert timings["total"] >= timings["image"] == 0
