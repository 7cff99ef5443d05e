"""What methods choose by: the K highest scores, similarities, means; and in what arithmetic.

On a CPU device choices are made in float64. In float32 the order in which a sum is taken decides
which of two near-duplicates wins, so that two machines keep different tokens. No GPU has float64:
there, choices are made in float32 where the tokens are, and nothing returns to the host. Only
`choice_dtype` decides between the two. All functions but `keep_highest` and `mask_of`, and what
uses their results, are called under `choosing()`.

Shapes: B images, N tokens, M others, D features, K kept.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, ParamSpec, TypeVar

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError

E = 2.718281828459045  # `mx.exp` computes in float32 even in float64; `mx.power` does not


class NotFiniteError(UserError):
    """Tokens that a method was to choose from are not finite."""

    def __init__(
        self, reason: str = "the vision tower gave NaN or infinite features; try dtype='float32'"
    ):
        super().__init__(reason)


Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
_forced: ContextVar[mx.Dtype | None] = ContextVar("_forced", default=None)
_fuses: ContextVar[bool] = ContextVar("_fuses", default=False)


def choice_dtype() -> mx.Dtype:
    """In what choices are made: float64 on a CPU device, float32 on a GPU."""
    return _forced.get() or (mx.float64 if mx.default_device() == mx.cpu else mx.float32)


@contextmanager
def choosing() -> Iterator[None]:
    """Inside the block, choices are made where `choice_dtype` can be computed: float64 on the CPU,
    float32 where the tokens are."""
    if choice_dtype() == mx.float64:
        with mx.stream(mx.cpu):
            yield
    else:
        yield


@contextmanager
def precision(name: Literal["float32", "float64"], *, fuse: bool = False) -> Iterator[None]:
    """Inside the block, choices are made in this dtype whatever the device, in float32 by `fused`
    functions or not: for tests."""
    tokens = _forced.set(getattr(mx, name)), _fuses.set(fuse)
    try:
        yield
    finally:
        _forced.reset(tokens[0])
        _fuses.reset(tokens[1])


def fused(
    function: Callable[Arguments, Result], *, any_shape: bool = True
) -> Callable[Arguments, Result]:
    """A function of elementwise operations in as few launches as `mx.compile` makes of them, on a
    GPU only: on a CPU a launch costs little, and it would need a C++ compiler at run time.

    It is traced once for all shapes, so it has no size in it, no slice, and no reduction (which
    crashes over an axis of one entry); or, without `any_shape`, once for each, which makes fewer
    launches of a long function. No constant in it is infinite, which MLX 0.31 cannot compile, or
    needs more than seven digits, which it cuts off.
    """
    compiled = mx.compile(function, shapeless=any_shape)

    @functools.wraps(function)
    def either(*arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
        is_on_gpu = _fuses.get() or mx.default_device() == mx.gpu
        if is_on_gpu and choice_dtype() == mx.float32:
            result: Result = compiled(*arguments, **options)
            return result
        return function(*arguments, **options)

    return either


def to_choice_dtype(x: mx.array) -> mx.array:
    """In the dtype of choices."""
    return x.astype(choice_dtype())


def constant(value: float) -> mx.array:
    """A number in the dtype of choices. (Beside an array a Python float is rounded to float32.)"""
    return mx.array(value, choice_dtype())


def on_host(*arrays: mx.array) -> list[np.ndarray]:
    """Arrays in numpy, computed together: the one return to the host of a method that is sequential
    by definition. Floats become float64. Raises NotFiniteError where some are not finite."""
    mx.eval(arrays)
    values = [np.array(array) for array in arrays]
    if not all(np.isfinite(value).all() for value in values if value.dtype.kind == "f"):
        raise NotFiniteError
    return [v.astype(np.float64, copy=False) if v.dtype.kind == "f" else v for v in values]


def compute_on_cpu(*arrays: mx.array) -> None:
    """Compute them now, only on the CPU, so that blocks of rows they are made from are freed."""
    if choice_dtype() == mx.float64:
        mx.eval(arrays)


def after_step(count: int, *arrays: mx.array) -> None:
    """Compute what `count` steps of a loop came to, once in a while and only on the CPU: the graph
    of thousands of steps takes more memory than their arrays."""
    if choice_dtype() == mx.float64 and count % 64 == 0:
        mx.eval(arrays)


def keep_highest(score_BN: mx.array, K: int) -> mx.array:
    """Indices (B, K), ascending, of the K highest scores; ties go to the lower index."""
    if score_BN.dtype != mx.float64:
        score_BN = score_BN.astype(mx.float32)
    order_BK = mx.argsort(-mx.stop_gradient(score_BN), axis=-1)[:, :K]  # stable
    return mx.sort(order_BK, axis=-1) if K else order_BK


def keep_marked(is_kept_BN: mx.array, K: int) -> mx.array:
    """Indices (B, K), ascending, of the K marked tokens of each image."""
    return mx.argsort(~is_kept_BN, axis=-1)[:, :K]  # stable


def unit(x_BND: mx.array) -> mx.array:
    """Tokens scaled to length one; a zero token stays zero."""
    x_BND = to_choice_dtype(x_BND)
    return by_root(x_BND, mx.square(x_BND).sum(axis=-1, keepdims=True))


@fused
def by_root(x_BND: mx.array, square_BN1: mx.array) -> mx.array:
    """Divided by the root of squared lengths."""
    return x_BND / mx.maximum(mx.sqrt(square_BN1), constant(1e-6))


def cosine(x_BND: mx.array, y_BMD: mx.array | None = None) -> mx.array:
    """Cosine similarity of every two tokens, (B, N, M).

    Rounded, so that equal tokens tie in whatever order a product is summed.
    """
    x_BND = unit(x_BND)
    y_BMD = x_BND if y_BMD is None else unit(y_BMD)
    return rounded_cosine(x_BND @ y_BMD.swapaxes(1, 2))


def rounded(x: mx.array, digits: int = 12) -> mx.array:
    """Rounded to so many digits after the point; in float32 to its first 20 bits, six digits.

    Twelve of float64's sixteen digits, six of float32's seven: what is left out is what the order
    of a sum changes, so that equal tokens tie. Scores of N tokens may be as small as 1 / N, so that
    six digits after the point would leave nothing. (`mx.round` itself scales in float32.)
    """
    if choice_dtype() == mx.float64:
        scale = constant(10.0**digits)
        return mx.round(to_choice_dtype(x) * scale) / scale
    return first_20_bits(x.astype(mx.float32).view(mx.uint32)).view(mx.float32)


@fused
def first_20_bits(bits: mx.array) -> mx.array:
    """Of a float32 as a whole number, the fraction rounded to that many bits."""
    return ((bits + 8) >> 4) << 4


@fused
def rounded_cosine(x: mx.array) -> mx.array:
    """The same of cosines, sums of either sign: in float32 to six digits after the point."""
    if choice_dtype() == mx.float64:
        return rounded(x)
    return mx.round(x * 1e6) / 1e6


def noise() -> float:
    """What rounding may leave of the difference of two numbers up to one; in float32 half of the
    1e-5 by which scores may differ between devices."""
    return 1e-9 if choice_dtype() == mx.float64 else 5e-6


def exp(x: mx.array) -> mx.array:
    """Of an array in the dtype of choices."""
    return mx.power(constant(E), x) if x.dtype == mx.float64 else mx.exp(x)


def all_finite(x: mx.array) -> mx.array:
    """Are all entries finite numbers?"""
    return is_finite(x).all()


@fused
def is_finite(x: mx.array) -> mx.array:
    """Of each entry."""
    return mx.isfinite(x)


def softmax(logits: mx.array, temperature: float = 1.0) -> mx.array:
    """Softmax over the last axis."""
    power = powers(logits, logits.max(axis=-1, keepdims=True), temperature)
    return power / power.sum(axis=-1, keepdims=True)


@fused
def powers(logits: mx.array, largest: mx.array, temperature: float) -> mx.array:
    """What a softmax adds up."""
    return exp((logits - largest) / temperature)


def scale_to_unit(score_BN: mx.array) -> mx.array:
    """Scores from 0 (an image's lowest) to 1 (its highest); 0 where all are equal."""
    score_BN = to_choice_dtype(score_BN)
    return between(score_BN, score_BN.min(-1, keepdims=True), score_BN.max(-1, keepdims=True))


@fused
def between(score_BN: mx.array, low_B1: mx.array, high_B1: mx.array) -> mx.array:
    """Where scores lie between two others, 0 to 1."""
    return (score_BN - low_B1) / mx.maximum(high_B1 - low_B1, constant(1e-12))


def mask_of(index_BK: mx.array, N: int) -> mx.array:
    """Which of N tokens are in an index, (B, N)."""
    return (index_BK[..., None] == mx.arange(N, dtype=index_BK.dtype)).any(axis=1)
