"""Promises of where choices are made: on a GPU in float32 and without a return to the host.

Here the CPU device stands in for a GPU by `numerics.precision("float32")`. What returns to the host
shows while MLX traces a function: reading an array that depends on its input is an error there.
"""

import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.models.layers import TwigReader
from mlx_vlm_prune.pruners import METHODS, Pruner, Signals, Stage, numerics, plan, resolve
from mlx_vlm_prune.pruners.attention_pool import AttentionPool
from mlx_vlm_prune.pruners.numerics import NotFiniteError, precision

from . import tiny
from .pruner_cases import D, case, float64_choices, signals

K = 9
ROWS = (tiny.row("user # what is in the picture ?"), tiny.row("# and # is there a red star ?"))
SPECS = [
    *(name for name in METHODS if name not in ("restore", "ivc")),
    "mlp:dynamic", "visionzip+fastv", "tome+divprune", "downsample+norm", "fastv+restore",
    "cls_attention+cdpruner", "cls_attention+restore", "patch_norm:keep=11+norm", "twig+restore",
    "divprune+restore:published", "divprune:budget=similarity",
    "divprune+ivc+restore", "fastv+ivc",
]  # fmt: skip
UNTAUGHT = [
    name for name, method in METHODS.items()
    if Stage.IMAGE < method.stage < Stage.ENHANCER and not method.learned and name != "none"
]  # fmt: skip
# How often a method returns to the host: what its docstring declares.
RETURNS = {
    "pact": 1, "similarity": 1, "mlp:dynamic": 1, "prunesid": 1, "divprune:budget=similarity": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    loaded, _ = load(tiny.checkpoint(tiny.taught(tiny.reference()), folder), dtype="float32")
    return loaded


class Traced(Exception):
    """The end of a trace: the function itself need not run."""


def trace(model, run, *inputs: mx.array) -> None:
    """Run up to the first logits, while nothing that depends on inputs or weights can be read."""
    weights = model.parameters()
    weights.pop("image_newline", None)  # of LLaVA-NeXT: mlx-vlm reads this weight itself

    def read(traced: dict, *inputs: mx.array) -> None:
        model.update(traced)
        assert run(*inputs).size
        raise Traced

    try:
        with precision("float32"), pytest.raises(Traced):
            mx.compile(read)(weights, *inputs)
    finally:
        model.update(weights)


def read_while_tracing(model, spec: str, twig: TwigReader | None = None) -> None:
    """Prompts of a batch up to the first logits."""
    pool = AttentionPool(K, tiny.VISION.hidden_size)
    chain = plan(spec, {**model.learned, "attention_pool": pool})
    budget = model.N if spec == "none" else K

    def logits_BV(pixels: mx.array) -> mx.array:
        return model(ROWS, pixels, chain, budget, twig=twig).logits_BV

    trace(model, logits_BV, mx.random.normal((3, 64, 64, 3), key=mx.random.key(0)))


def replace_returns(monkeypatch, stand_in) -> None:
    """Put a function in place of the one door to the host, in every method."""
    door = numerics.on_host
    for module in list(sys.modules.values()):
        if vars(module).get("on_host") is door:
            monkeypatch.setattr(module, "on_host", stand_in)


@pytest.mark.parametrize("spec", SPECS)
def test_nothing_returns_to_the_host_before_the_first_logits(model, spec, monkeypatch):
    returns = []

    def stand_in(*arrays: mx.array) -> list[np.ndarray]:
        returns.append(arrays)
        values = [np.linspace(0, 1, a.size).reshape(a.shape) for a in arrays]
        return [np.full(a.shape, K) for a in arrays] if "dynamic" in spec else values

    replace_returns(monkeypatch, stand_in)
    read_while_tracing(model, spec)
    assert len(returns) == RETURNS.get(spec, 0)


@pytest.mark.parametrize("spec", ["divprune", "twig", "twig+restore"])
def test_a_twig_that_reads_along_does_not_either(model, spec, monkeypatch):
    started = []
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: started.append(arrays))
    read_while_tracing(model, spec, TwigReader(model.learned["twig"]))
    assert len(started) == 1  # its last keys and values, for which nobody waits


@pytest.mark.parametrize("spec", SPECS)
def test_a_whole_prompt_keeps_in_float32_what_it_keeps_in_float64(model, spec):
    chain = plan(spec, {**model.learned, "attention_pool": AttentionPool(K, 32)})
    pixels = mx.random.normal((3, 64, 64, 3), key=mx.random.key(1))
    kept, logits = [], []
    for arithmetic in (float64_choices(), precision("float32")):
        with arithmetic:
            prefill = model(ROWS, pixels, chain, model.N if spec == "none" else K)
            logits.append(np.array(prefill.logits_BV))
            kept.append([prefill.trace.kept(image) for image in range(3)])
    assert kept[0] == kept[1]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("read", [mx.eval, np.array, lambda x: x.sum().item(), mx.async_eval])
def test_a_planted_read_would_be_seen(model, read, monkeypatch):
    def reading(score_BN: mx.array, K: int) -> mx.array:
        read(score_BN)
        return numerics.keep_highest(score_BN, K)

    monkeypatch.setattr("mlx_vlm_prune.pruners.norm.keep_highest", reading)
    with pytest.raises(BaseException, match="eval"):
        read_while_tracing(model, "norm")


def test_features_that_are_not_numbers_are_refused_where_the_choice_is_read(model):
    broken = Signals(mx.full((1, 16, 8), mx.nan), (4, 4))
    with precision("float32"):
        kept = resolve("norm")(broken, 4)
        with pytest.raises(UserError, match="the vision tower gave NaN or infinite features"):
            kept.check()
        prefill = model(ROWS, mx.full((3, 64, 64, 3), mx.nan), plan("divprune+fastv"), K)
    with pytest.raises(UserError, match="the vision tower gave NaN or infinite features"):
        prefill.trace.kept(0)


@pytest.mark.parametrize("name", UNTAUGHT)
def test_one_token_that_is_no_number_ends_no_method_in_another_way(name):
    arrays = case("random", 1, (4, 4), 0)
    arrays["x_BND"][:, 3] = np.nan
    with precision("float32"), pytest.raises(NotFiniteError):
        resolve(name)(signals(arrays), 4).check()


def test_budgets_of_tokens_that_are_no_numbers_are_refused():
    arrays = case("random", 1, (4, 4), 0)
    arrays["x_BND"][:, 3] = arrays["cls_row_BN"][:] = np.nan
    broken, flowcut = signals(arrays), resolve("flowcut")
    taught = Pruner("mlp", METHODS["mlp"], {"dynamic": True}, METHODS["mlp"].make_weights(D, 1))
    with precision("float32"):
        for pruner in (resolve("divprune:budget=similarity"), taught):
            with pytest.raises(NotFiniteError, match="the vision tower gave NaN or infinite"):
                pruner.budgets(broken, broken, 4)
        with pytest.raises(NotFiniteError):
            flowcut.call(flowcut.method.left, broken, 4, 2)


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="a GPU chooses in float32")
def test_a_cpu_device_chooses_in_float64_on_the_cpus_stream():
    assert numerics.choice_dtype() == mx.float64
    with precision("float32"), numerics.choosing():
        assert numerics.cosine(mx.ones((1, 2, 3))).dtype == mx.float32
    with numerics.choosing():
        assert numerics.cosine(mx.ones((1, 2, 3))).dtype == mx.float64


def test_equal_numbers_of_any_size_stay_apart_or_tie_as_six_digits_say():
    x = mx.array([1 / 2304, 1 / 2304 * (1 + 1e-7), 1 / 2304 * (1 + 1e-5), 0, -3e4, mx.inf])
    with precision("float32"):
        near = np.array(numerics.rounded(x))
    assert near[0] == near[1] < near[2] and near[3] == 0 and np.isinf(near[5])
    np.testing.assert_allclose(near[:5], np.array(x)[:5], rtol=1e-6)
