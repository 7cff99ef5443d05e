"""The contract, and every method in one table.

A new method is one file with `stage`, `needs` and `prune(signals, K, *, options)`,
its twin in torch_ref, and one line in `METHODS`.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx

from convert.errors import UserError

from . import attention_pool, avgpool, cls_attention, none, norm, random, similarity, uniform
from .contract import Reduction, Signals, Stage, identity

METHODS: dict[str, ModuleType] = {
    "none": none,
    "random": random,
    "uniform": uniform,
    "avgpool": avgpool,
    "norm": norm,
    "similarity": similarity,
    "cls_attention": cls_attention,
    "attention_pool": attention_pool,
}

__all__ = ["METHODS", "Pruner", "Reduction", "Signals", "Stage", "resolve"]


@dataclass(frozen=True)
class Pruner:
    """A method with its options, ready to call on signals and a budget K."""

    name: str
    method: ModuleType
    options: dict[str, Any] = field(default_factory=dict)
    learned: Any = None  # the checkpoint's weights, of a learned method

    @property
    def want(self) -> dict[str, int]:
        """What the tower must hand over, and of which layer."""
        layer = self.options.get("layer", _options(self.method).get("layer", -1))
        return dict.fromkeys(self.method.needs, layer)

    @property
    def is_learned(self) -> bool:
        return not hasattr(self.method, "prune")

    def __call__(self, signals: Signals, K: int) -> Reduction:
        """Reduce to K slots. K = N is the identity, bit for bit, whatever the method."""
        N = signals.x_BND.shape[1]
        if not 1 <= K <= N:
            raise UserError(f"cannot keep {K} of {N} visual tokens; keep 1 to {N}")
        if K == N:
            return identity(signals.x_BND)
        if not mx.isfinite(signals.x_BND).all().item():
            raise UserError("the vision tower gave NaN or infinite features; try --dtype float32")
        prune: Callable = self.learned.prune if self.is_learned else self.method.prune
        try:
            return partial(prune, **self.options)(signals, K)
        except ValueError as e:  # an option's value, of the right type and yet impossible
            raise UserError(f"{self.name}: {e}") from None


def resolve(spec: "str | Pruner", learned: tuple[str, Any] | None = None) -> Pruner:
    """The pruner that "NAME" or "NAME:option=value,option=value" names.

    `learned` is the name and weights of the learned pruner in the checkpoint, if any.
    Raises UserError for an unknown name or option, or a value of the wrong type.
    """
    if isinstance(spec, Pruner):
        return spec
    name, _, listed = spec.partition(":")
    if name not in METHODS:
        raise UserError(f"no pruner is called {name!r}; {nearest(name, METHODS)}")
    method = METHODS[name]
    known = _options(method)
    options: dict[str, Any] = {}
    for pair in filter(None, listed.split(",")):
        key, equals, value = pair.partition("=")
        if key not in known:
            what = nearest(key, known) if known else "it has none"
            raise UserError(f"{name} has no option {key!r}; {what}")
        options[key] = _parse(name, key, value if equals else "true", known[key])
    pruner = Pruner(name, method, options)
    if not pruner.is_learned:
        return pruner
    if learned is None or learned[0] != name:
        raise UserError(f"{name} is learned, and this checkpoint holds no weights for it")
    return Pruner(name, method, options, learned[1])


def nearest(name: str, known: "dict[str, Any]") -> str:
    """Words for an error: the close matches, and everything there is."""
    close = difflib.get_close_matches(name, known, n=3)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{meant}there are {', '.join(known)}"


def _options(method: ModuleType) -> dict[str, Any]:
    """Names and defaults of a method's options: its keyword-only parameters."""
    if not hasattr(method, "prune"):
        return {}
    parameters = inspect.signature(method.prune).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _parse(name: str, key: str, value: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError):
        article = "an" if kind is int else "a"
        raise UserError(
            f"option {key} of {name} takes {article} {kind.__name__}, not {value!r}"
        ) from None
