"""The counted operations are those that are executed: every matrix product is instrumented.

MLX's functions are instrumented while a small model runs, and torch's operators under the
reference. Products that select, mix or resize tokens are counted separately.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import mlx.core as mx
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_ref.models.decoder
import torch_ref.models.towers.signals
import torch_ref.models.vlm
from mlx_vlm_prune.checkpoints.config import (
    CLIPConfig,
    MiniMindConfig,
    ProjectorConfig,
    SiglipConfig,
    VLMConfig,
)
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.machine.clock import Clock
from mlx_vlm_prune.models import decoder, image_encoder, layers
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.models.towers import signals as tower_signals
from mlx_vlm_prune.models.towers import vit
from mlx_vlm_prune.models.vlm import VLM
from mlx_vlm_prune.planning import operations
from mlx_vlm_prune.planning.operations import count
from mlx_vlm_prune.pruners import METHODS, PRESETS, Pruner, Reduction, Stage, plan

from . import tiny

# No two sizes are alike, so that none can stand in for another.
SIZES = {"hidden_size": 24, "intermediate_size": 44, "num_hidden_layers": 4,
         "num_attention_heads": 3, "image_size": 60, "patch_size": 10}  # fmt: skip
CLIP, SIGLIP = CLIPConfig(**SIZES), SiglipConfig(**SIZES)
LLAMA = MiniMindConfig(40, 52, 5, 10, 2, 70)
QWEN = replace(LLAMA, num_key_value_heads=5, qk_norm=True)
TWO_AND_SHARED = {"num_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
CONFIGS = {
    "clip": VLMConfig(CLIP, LLAMA),
    "siglip": VLMConfig(SIGLIP, QWEN, ProjectorConfig()),
    "clip, its last layer but one": VLMConfig(
        replace(CLIP, feature_layers=3), replace(LLAMA, attention_bias=True), ProjectorConfig()
    ),
    "siglip, blocks of patches": VLMConfig(SIGLIP, QWEN, ProjectorConfig((3, 2), norm=False)),
    "two experts and a shared one": VLMConfig(CLIP, replace(LLAMA, **TWO_AND_SHARED)),
    "one expert": VLMConfig(CLIP, replace(QWEN, num_experts=4, num_experts_per_tok=1)),
}
CHAINS = (
    *PRESETS, "cls_attention+restore", "tome+divprune", "downsample+tome+norm+fastv",
    "ipcv+norm", "ipcv:until=3+cls_attention:layer=-1", "patch_norm:keep=30+ipcv:until=3+norm",
)  # fmt: skip
STAGES = ("downsample", "tome", "patch_norm", "uniform", "divprune", "fastv", "pyramiddrop")
PAIRS = [  # blocks of patches need all patches, so inside that tower none may leave
    (name, spec)
    for name in CONFIGS
    for spec in STAGES
    if not ("blocks" in name and METHODS[spec].stage is Stage.ENCODER)
]
TEXT_TOKENS = 11


@dataclass
class OperationCounter(Clock):
    """Multiply-adds of each part, which ends at `end_part`, and those of selecting tokens."""

    ms: dict = field(default_factory=dict)  # none of Clock's parts: it ends every one
    parts: Counter = field(default_factory=Counter)
    since_part: int = 0
    selection_depth: int = 0
    selection: int = 0

    def product(self, *sizes: int) -> None:
        if self.selection_depth:
            self.selection += math.prod(sizes)
        else:
            self.since_part += math.prod(sizes)

    def end_part(self, name: str, value: object = None) -> object:
        self.parts[name] += self.since_part
        self.since_part = 0
        return value

    @contextlib.contextmanager
    def selecting(self) -> Iterator[None]:
        self.selection_depth += 1
        try:
            yield
        finally:
            self.selection_depth -= 1

    def count_as_selection(self, patch: pytest.MonkeyPatch, owner: object, *names: str) -> None:
        """Products in these functions are for the selection of tokens."""
        for name in names:
            patch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, function):
        def call(*arguments, **options):
            with self.selecting():
                return function(*arguments, **options)

        return call


@pytest.fixture
def counter(monkeypatch) -> OperationCounter:
    """A counter of the products of every MLX function by which the package multiplies matrices."""
    counter = OperationCounter()

    def matmul(x, y, *rest, **options):
        counter.product(*x.shape, y.shape[-1])
        return plain_matmul(x, y)

    def addmm(c, x, y, **options):
        counter.product(*x.shape, y.shape[-1])
        return plain_addmm(c, x, y, **options)

    def conv2d(x, weight, *rest):
        y = plain_conv2d(x, weight, *rest)
        counter.product(*y.shape, *weight.shape[1:])
        return y

    def gather_mm(x, weight, **options):
        counter.product(*x.shape, weight.shape[-1])
        return plain_gather_mm(x, weight, **options)

    def attention(q, k, v, **options):
        counter.product(*q.shape, k.shape[2])
        counter.product(*q.shape[:3], *v.shape[2:])
        return plain_attention(q, k, v, **options)

    plain_matmul, plain_addmm, plain_conv2d = mx.array.__matmul__, mx.addmm, mx.conv2d
    plain_gather_mm, plain_attention = mx.gather_mm, mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.array, "__matmul__", matmul)
    for function in (addmm, conv2d, gather_mm):
        monkeypatch.setattr(mx, function.__name__, function)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    counter.count_as_selection(monkeypatch, Pruner, "__call__", "call")
    counter.count_as_selection(monkeypatch, Reduction, "apply", "after", "mixture")
    counter.count_as_selection(monkeypatch, tower_signals.TowerPass, "read")
    counter.count_as_selection(monkeypatch, tower_signals, "_with_sizes")
    counter.count_as_selection(monkeypatch, decoder.LayerInput, "signals", "bias_of")
    for module in (image_encoder, vit):
        counter.count_as_selection(monkeypatch, module, "shrink")
    return counter


def prompt(N: int, image: int, images: int = 1) -> Prompt:
    """TEXT_TOKENS tokens of text, with images of N tokens each after the third."""
    runs = [(3 + N * i, N) for i in range(images)]
    return Prompt([5, 9, 7, *[image] * (N * images), *range(3, TEXT_TOKENS)], runs)


def learned(config: VLMConfig, K: int) -> dict:
    """Random weights of the learned methods."""
    dims = config.vision.hidden_size * math.prod(config.projector.merge if config.projector else ())
    weights = {
        name: METHODS[name].make_weights(dims, K)
        for name in ("attention_pool", "score_prune", "mlp", "learn_prune")
    }
    return {**weights, "twig": Twig(config.text, 2, 1)}


def run(
    config: VLMConfig, spec: str, K: int, counter: OperationCounter, images: int = 1, B: int = 1
):
    """One instrumented forward pass: the model, its prefill, and the counted operations."""
    model = VLM(config)
    side = config.vision.image_size
    pixels = mx.random.normal((images * B, side, side, 3))
    pipeline = plan(spec, learned(config, K))
    rows = [prompt(model.N, config.image_token_id, images)] * B
    with counter.running():
        prefill = model(rows, pixels, pipeline, K)
    return model, prefill, count(config, TEXT_TOKENS, pipeline, K, images=images)


def assert_equal(counted: operations.Operations, counter: OperationCounter, times: int = 1) -> None:
    assert counter.parts["vision"] == times * counted.vision
    assert counter.parts["projector"] == times * counted.projector
    assert counter.parts["prefill"] == times * counted.prefill
    assert counter.parts["pruner"] == 0


def budget(config: VLMConfig, spec: str) -> int:
    """A third of the tokens, or in the decoder as few as it allows."""
    N, pipeline = config.N, plan(spec, learned(config, 1))
    if spec == "none":
        return N
    for K in range(N // 3, N):
        with contextlib.suppress(UserError):
            count(config, TEXT_TOKENS, pipeline, K)
            return K
    raise AssertionError(f"no budget for {spec}")


FORECAST = {"flowcut": "flowcut:entropy=0.9"}  # else an image decides how many of its tokens leave
SINGLE = [FORECAST.get(n, n) for n, m in METHODS.items() if m.stage is not Stage.ENHANCER]


@pytest.mark.parametrize("spec", [*SINGLE, *CHAINS])
def test_every_method_takes_the_counted_operations(spec, counter):
    config = CONFIGS["clip"]
    K = budget(config, spec)
    assert spec == "none" or config.N > K
    _, prefill, counted = run(config, spec, K, counter)
    assert_equal(counted, counter)
    assert counted.cache_bytes == sum(layer.nbytes for layer in prefill.cache)
    assert counted.rows == tuple(layer.rows for layer in prefill.cache)


@pytest.mark.parametrize(("name", "spec"), PAIRS)
def test_every_kind_of_model_takes_the_counted_operations(name, spec, counter):
    config = CONFIGS[name]
    _, prefill, counted = run(config, spec, budget(config, spec), counter)
    assert_equal(counted, counter)
    assert counted.cache_bytes == sum(layer.nbytes for layer in prefill.cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_models_take_the_counted_operations_and_none_for_selection(name, counter):
    config = CONFIGS[name]
    _, _, counted = run(config, "none", config.N, counter)
    assert_equal(counted, counter)
    assert counter.selection == 0
    assert counted.visual == (config.N,) * config.text.num_hidden_layers


@pytest.mark.parametrize("spec", ["none", "fastv", "divprune"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_new_token_takes_the_counted_operations(name, spec, counter):
    config = CONFIGS[name]
    _, prefill, counted = run(config, spec, budget(config, spec), counter)
    for i in range(3):
        counter.since_part = 0
        prefill.step(mx.array([[7]]))
        rows = [layer_rows + 1 + i for layer_rows in counted.rows]
        assert counter.since_part == operations.decode(config.text, rows)
        assert i or counter.since_part == counted.decode


@pytest.mark.parametrize("spec", ["none", "uniform", "fastv"])
def test_several_images_and_several_prompts_take_the_counted_operations(spec, counter):
    config = CONFIGS["clip"]
    K = budget(config, spec)
    _, prefill, counted = run(config, spec, K, counter, images=2, B=3)
    assert_equal(counted, counter, times=3)
    assert 3 * counted.cache_bytes == sum(layer.nbytes for layer in prefill.cache)


def test_a_prompt_that_is_read_in_pieces_takes_the_counted_operations(counter, monkeypatch):
    config = CONFIGS["clip"]
    in_one_piece = count(config, TEXT_TOKENS, plan("none"), config.N)
    monkeypatch.setattr(layers, "PREFILL_STEP_SIZE", 13)
    monkeypatch.setattr(operations, "PREFILL_STEP_SIZE", 13)
    _, _, counted = run(config, "none", config.N, counter)
    assert_equal(counted, counter)
    assert counted.prefill < in_one_piece.prefill  # no piece attends to a later one


def test_products_of_the_selection_are_counted_separately(counter):
    run(CONFIGS["clip"], "divprune", 12, counter)
    assert counter.selection > 0


# --- the reference -------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Multiply-adds of torch's operators."""

    def __init__(self, counter: OperationCounter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("mm", "bmm"):
            self.counter.product(*args[0].shape, args[1].shape[-1])
        elif name in ("addmm", "baddbmm"):
            self.counter.product(*args[1].shape, args[2].shape[-1])
        elif name == "convolution":
            self.counter.product(*y.shape, *args[1].shape[1:])
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            q, k, v = args[:3]
            self.counter.product(*q.shape, k.shape[2])
            self.counter.product(*q.shape[:3], *v.shape[2:])
        else:
            assert "mm" not in name.split("_") and "attention" not in name and "conv" not in name
        return y


@pytest.mark.parametrize(
    "spec", ["none", "uniform", "divprune", "tome", "downsample", "fastv", "visionzip", "dart"]
)
def test_the_reference_takes_the_counted_operations_too(spec, monkeypatch):
    vlm, counter, K = tiny.reference(), OperationCounter(), tiny.N if spec == "none" else 9
    same = {f: getattr(tiny.VISION, f) for f in SIZES}
    text = MiniMindConfig(48, 64, 3, 4, 2, tiny.TEXT.vocab_size)
    counted = count(VLMConfig(CLIPConfig(**same), text), TEXT_TOKENS, plan(spec), K)
    counter.count_as_selection(monkeypatch, torch_ref.models.vlm, "choose")
    counter.count_as_selection(monkeypatch, torch_ref.models.towers.signals.Encoded, "read", "cut")
    counter.count_as_selection(monkeypatch, torch_ref.models.decoder, "choose", "signals")
    counter.count_as_selection(monkeypatch, torch_ref.pruners.Reduction, "tokens", "after")
    with torch.no_grad(), Operators(counter):
        vlm.prefill(*vlm.embed([prompt(tiny.N, tiny.IMAGE)], torch.randn(1, 3, 64, 64), spec, K))
    assert counter.since_part == counted.first_token
