"""The counted work is the work that is done: every product of matrices is watched.

Watched are MLX's own functions while a small model runs, and once more torch's operators under
the reference. What is multiplied in order to choose, mix or resize is watched apart.
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
from mlx_vlm_prune.models import decoder
from mlx_vlm_prune.models import vlm as vlm_module
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
CHAINS = (*PRESETS, "cls_attention+restore", "tome+divprune", "downsample+tome+norm+fastv")
STAGES = ("downsample", "tome", "patch_norm", "uniform", "divprune", "fastv", "pyramiddrop")
PAIRS = [  # blocks of patches need all patches, so inside that tower none may leave
    (name, spec)
    for name in CONFIGS
    for spec in STAGES
    if not ("blocks" in name and METHODS[spec].stage is Stage.ENCODER)
]
WORDS = 11


@dataclass
class Watch(Clock):
    """Multiply-adds by part, a part ending at `end_part`; and of them, those made in choosing."""

    parts: Counter = field(default_factory=Counter)
    since: int = 0
    choosing: int = 0
    for_choice: int = 0

    def product(self, *sizes: int) -> None:
        if self.choosing:
            self.for_choice += math.prod(sizes)
        else:
            self.since += math.prod(sizes)

    def end_part(self, name: str, value: object = None) -> object:
        self.parts[name] += self.since
        self.since = 0
        return value

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        self.choosing += 1
        yield
        self.choosing -= 1

    def set_apart(self, patch: pytest.MonkeyPatch, owner: object, *names: str) -> None:
        """Whatever these functions multiply is for a choice."""
        for name in names:
            patch.setattr(owner, name, self._wrapped(getattr(owner, name)))

    def _wrapped(self, function):
        def call(*arguments, **options):
            with self.apart():
                return function(*arguments, **options)

        return call


@pytest.fixture
def watch(monkeypatch) -> Watch:
    """Every function of MLX by which the package multiplies matrices, watched."""
    watched = Watch()

    def matmul(x, y, *rest, **options):
        watched.product(*x.shape, y.shape[-1])
        return plain_matmul(x, y)

    def addmm(c, x, y, **options):
        watched.product(*x.shape, y.shape[-1])
        return plain_addmm(c, x, y, **options)

    def conv2d(x, weight, *rest):
        y = plain_conv2d(x, weight, *rest)
        watched.product(*y.shape, *weight.shape[1:])
        return y

    def gather_mm(x, weight, **options):
        watched.product(*x.shape, weight.shape[-1])
        return plain_gather_mm(x, weight, **options)

    def attention(q, k, v, **options):
        watched.product(*q.shape, k.shape[2])
        watched.product(*q.shape[:3], *v.shape[2:])
        return plain_attention(q, k, v, **options)

    plain_matmul, plain_addmm = mx.array.__matmul__, mx.addmm
    plain_conv2d, plain_gather_mm = mx.conv2d, mx.gather_mm
    plain_attention = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.array, "__matmul__", matmul)
    monkeypatch.setattr(mx, "addmm", addmm)
    monkeypatch.setattr(mx, "conv2d", conv2d)
    monkeypatch.setattr(mx, "gather_mm", gather_mm)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    watched.set_apart(monkeypatch, Pruner, "__call__", "call")
    watched.set_apart(monkeypatch, Reduction, "apply", "after", "mixture")
    watched.set_apart(monkeypatch, tower_signals.TowerPass, "read")
    watched.set_apart(monkeypatch, tower_signals, "_sum_sizes")
    watched.set_apart(monkeypatch, decoder.LayerInput, "signals", "bias_of")
    for module in (vlm_module, vit):
        watched.set_apart(monkeypatch, module, "shrink")
    return watched


def prompt(N: int, image: int, images: int = 1) -> Prompt:
    """WORDS words, with some images of N tokens after the third."""
    runs = [(3 + N * i, N) for i in range(images)]
    return Prompt([5, 9, 7, *[image] * (N * images), *range(3, WORDS)], runs)


def learned(config: VLMConfig, K: int) -> dict:
    """Random weights of the learned methods."""
    dims = config.vision.hidden_size * math.prod(config.projector.merge if config.projector else ())
    made = {
        name: METHODS[name].make_weights(dims, K)
        for name in ("attention_pool", "score_prune", "mlp")
    }
    return {**made, "twig": Twig(config.text, 2, 1)}


def run(config: VLMConfig, spec: str, K: int, watch: Watch, images: int = 1, B: int = 1):
    """One forward pass under watch."""
    model = VLM(config)
    side = config.vision.image_size
    pixels = mx.random.normal((images * B, side, side, 3))
    pipeline = plan(spec, learned(config, K))
    rows = [prompt(model.N, config.image_token_id, images)] * B
    with watch.running():
        before = model(rows, pixels, pipeline, K)
    told = count(config, WORDS, pipeline, K, images=images)
    return model, before, told


def agree(told: operations.Operations, watch: Watch, times: int = 1) -> None:
    assert watch.parts["vision"] == times * told.vision
    assert watch.parts["projector"] == times * told.projector
    assert watch.parts["prefill"] == times * told.prefill
    assert watch.parts["pruner"] == 0


def budget(config: VLMConfig, spec: str) -> int:
    """A third of the tokens, or in the decoder as few as it allows."""
    N, pipeline = config.N, plan(spec, learned(config, 1))
    if spec == "none":
        return N
    for K in range(N // 3, N):
        with contextlib.suppress(UserError):
            count(config, WORDS, pipeline, K)
            return K
    raise AssertionError(f"no budget for {spec}")


SINGLE = [name for name, method in METHODS.items() if method.stage is not Stage.ENHANCER]


@pytest.mark.parametrize("spec", [*SINGLE, *CHAINS])
def test_every_method_takes_the_counted_work(spec, watch):
    config = CONFIGS["clip"]
    K = budget(config, spec)
    assert spec == "none" or config.N > K
    _, before, told = run(config, spec, K, watch)
    agree(told, watch)
    assert told.cache_bytes == sum(layer.nbytes for layer in before.cache)
    assert told.rows == tuple(layer.rows for layer in before.cache)


@pytest.mark.parametrize(("name", "spec"), PAIRS)
def test_every_kind_of_model_takes_the_counted_work(name, spec, watch):
    config = CONFIGS[name]
    _, before, told = run(config, spec, budget(config, spec), watch)
    agree(told, watch)
    assert told.cache_bytes == sum(layer.nbytes for layer in before.cache)


@pytest.mark.parametrize("name", CONFIGS)
def test_full_models_take_the_counted_work_and_nothing_to_choose(name, watch):
    config = CONFIGS[name]
    _, _, told = run(config, "none", config.N, watch)
    agree(told, watch)
    assert watch.for_choice == 0
    assert told.visual == (config.N,) * config.text.num_hidden_layers


@pytest.mark.parametrize("spec", ["none", "fastv", "divprune"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_new_token_takes_the_counted_work(name, spec, watch):
    config = CONFIGS[name]
    _, before, told = run(config, spec, budget(config, spec), watch)
    for i in range(3):
        watch.since = 0
        before.step(mx.array([[7]]))
        seen = [rows + 1 + i for rows in told.rows]
        assert watch.since == operations.decode(config.text, seen)
        assert i or watch.since == told.decode


@pytest.mark.parametrize("spec", ["none", "uniform", "fastv"])
def test_several_images_and_several_prompts_take_the_counted_work(spec, watch):
    config = CONFIGS["clip"]
    K = budget(config, spec)
    _, before, told = run(config, spec, K, watch, images=2, B=3)
    agree(told, watch, times=3)
    assert 3 * told.cache_bytes == sum(layer.nbytes for layer in before.cache)


def test_a_prompt_that_is_read_in_pieces_takes_the_counted_work(watch, monkeypatch):
    config = CONFIGS["clip"]
    whole = count(config, WORDS, plan("none"), config.N)
    monkeypatch.setattr(decoder, "PREFILL_STEP_SIZE", 13)
    monkeypatch.setattr(operations, "PREFILL_STEP_SIZE", 13)
    _, _, told = run(config, "none", config.N, watch)
    agree(told, watch)
    assert told.prefill < whole.prefill  # no piece looks at a later one


def test_what_choosing_takes_is_watched_apart(watch):
    run(CONFIGS["clip"], "divprune", 12, watch)
    assert watch.for_choice > 0


# --- the reference -------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Multiply-adds of torch's operators."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("mm", "bmm"):
            self.watch.product(*args[0].shape, args[1].shape[-1])
        elif name in ("addmm", "baddbmm"):
            self.watch.product(*args[1].shape, args[2].shape[-1])
        elif name == "convolution":
            self.watch.product(*y.shape, *args[1].shape[1:])
        elif name == "_scaled_dot_product_flash_attention_for_cpu":
            q, k, v = args[:3]
            self.watch.product(*q.shape, k.shape[2])
            self.watch.product(*q.shape[:3], *v.shape[2:])
        else:
            assert "mm" not in name.split("_") and "attention" not in name and "conv" not in name
        return y


@pytest.mark.parametrize(
    "spec", ["none", "uniform", "divprune", "tome", "downsample", "fastv", "visionzip", "dart"]
)
def test_the_reference_takes_the_counted_work_too(spec, monkeypatch):
    vlm, watch, K = tiny.reference(), Watch(), tiny.N if spec == "none" else 9
    same = {f: getattr(tiny.VISION, f) for f in SIZES}
    text = MiniMindConfig(48, 64, 3, 4, 2, tiny.TEXT.vocab_size)
    told = count(VLMConfig(CLIPConfig(**same), text), WORDS, plan(spec), K)
    watch.set_apart(monkeypatch, torch_ref.models.vlm, "reduce")
    watch.set_apart(monkeypatch, torch_ref.models.towers.signals.Encoded, "read", "cut")
    watch.set_apart(monkeypatch, torch_ref.models.decoder, "reduce", "signals")
    watch.set_apart(monkeypatch, torch_ref.pruners.Reduction, "tokens", "after")
    with torch.no_grad(), Operators(watch):
        vlm.prefill(*vlm.read([prompt(tiny.N, tiny.IMAGE)], torch.randn(1, 3, 64, 64), spec, K))
    assert watch.since == told.first_token
