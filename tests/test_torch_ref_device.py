"""The promise that the reference works on Apple's GPU, which has no float64.

A stand-in: tensors that say they are on another device, and are computed on the CPU. float64 there
is the TypeError that MPS raises.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import torch_ref.pruners as ref
from torch_ref.pruners.spec import parse_steps

from .pruner_cases import VARIANTS, D, case, reference_signals

GPU = torch.device("meta")  # a device that every build of torch knows, and that holds nothing
LEARNED = [name for name in ref.METHODS if ref.is_learned(name) and name != "twig"]


class OnDevice(torch.Tensor):
    """A tensor of the stand-in."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnDevice":
        if inner.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=GPU, strides=inner.stride()
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return computed(function, args, kwargs or {})


def computed(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """On the CPU; the result is where the device, or else the operands say."""
    operands: list[OnDevice] = []

    def unwrap(value: Any) -> Any:
        if isinstance(value, OnDevice):
            operands.append(value)
            return value.inner
        return value

    device = kwargs.get("device")
    args, kwargs = tree_map(unwrap, (args, kwargs))
    if device is not None:
        kwargs["device"] = torch.device("cpu")
    result = function(*args, **kwargs)
    is_there = bool(operands) if device is None else torch.device(device) == GPU
    plain = (torch.Tensor,)
    return tree_map(lambda x: OnDevice(x) if is_there and isinstance(x, plain) else x, result)


class Device(TorchDispatchMode):
    """Tensors are made on the stand-in, or brought there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return computed(function, args, kwargs or {})


@contextmanager
def device() -> Iterator[None]:
    with torch.no_grad(), Device():
        yield


def plain(x: torch.Tensor) -> torch.Tensor:
    return x.inner if isinstance(x, OnDevice) else x


def test_the_stand_in_has_no_float64():
    with device():
        x = torch.ones(3).to(GPU)
        assert x.device == GPU and (x + 1).device == GPU and x.cpu().double().sum() == 3
        for wrong in (lambda: x.double(), lambda: torch.ones(2, dtype=torch.float64, device=GPU)):
            with pytest.raises(TypeError, match="float64"):
                wrong()


@pytest.mark.parametrize("spec", VARIANTS)
def test_every_method_chooses_there_what_it_chooses_on_the_cpu(spec):
    signals = reference_signals(case("random", 2, (4, 4), 0))
    step = parse_steps(spec, signals.x_BND.shape[1], 5)[0]
    expected = ref.reduce(step.name, signals, 5, **step.options)
    with device():
        kept = ref.reduce(step.name, signals.to(GPU), 5, **step.options)
        tokens = kept.tokens(signals.x_BND.to(GPU))
    assert torch.equal(plain(tokens), expected.tokens(signals.x_BND))
    if expected.index_BK is not None:
        assert torch.equal(plain(kept.index_BK), expected.index_BK)


@pytest.mark.parametrize("name", LEARNED)
def test_learned_methods_do_too(name):
    torch.manual_seed(0)
    weights = ref.METHODS[name].make_weights(D, 5).eval()
    signals = reference_signals(case("random", 2, (4, 4), 0))
    expected = ref.reduce(name, signals, 5, weights)
    with device():
        kept = ref.reduce(name, signals.to(GPU), 5, weights)
        predicted = weights.budgets(signals.to(GPU), 5) if hasattr(weights, "budgets") else None
    if predicted:
        assert predicted == weights.budgets(signals, 5)
    if expected.index_BK is not None:
        assert torch.equal(plain(kept.index_BK), expected.index_BK)
