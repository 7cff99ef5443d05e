"""What a method's file says, with what holds where it says nothing.

Shapes: N visual tokens, K kept.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import ModuleType
from typing import Any, get_type_hints

from .contract import Policy, Stage

PROMPT_SIGNALS = {
    "text", "last_attention", "next_attention", "text_attention", "twig_attention", "held_keys",
}  # fmt: skip


def _unlearned(*sizes: Any) -> Any:
    raise AssertionError("the method has no weights")


def _nothing_settled(weights: Any) -> Mapping[str, Any]:
    return {}


def _any_budget(weights: Any) -> int | None:
    return None


@dataclass(frozen=True)
class Method:
    """A method's names, as its file has them; keyword-only parameters are its options.

    Without `prune` the weights choose: their class is what `make_weights` returns, and has it.
    """

    name: str
    doc: str
    stage: Stage
    needs: Mapping[str, str | None] = field(default_factory=dict)  # signals: option of the layer
    prune: Callable[..., Any] | None = None  # (signals, K): the reduction
    positions: Policy = "keep"  # of the paper
    proportional: bool = False  # does a merged token count as often as it has members?
    cuts: Callable[..., Any] | None = None  # (layers, N, K): [(layer, place, left)] of a tower
    schedule: Callable[..., Any] | None = None  # (layers, N, K): {layer: left} of a decoder
    attention_bias: Callable[..., Any] | None = (
        None  # (signals, kept): an enhancer's bias of attention
    )
    learned: bool = False  # does it come with weights?
    make_weights: Callable[..., Any] = (
        _unlearned  # untrained weights, unless the model must make them
    )
    fixed_options: Callable[[Any], Mapping[str, Any]] = _nothing_settled  # options that they fix
    trained_tokens: Callable[[Any], int | None] = _any_budget  # the one K that they allow

    @classmethod
    def of(cls, module: ModuleType) -> "Method":
        """The method of a file."""
        names = {f.name for f in fields(cls)}
        declared = {name: value for name, value in vars(module).items() if name in names}
        name, doc = module.__name__.rpartition(".")[2], inspect.getdoc(module) or ""
        learned = {"learned": declared.get("learned", "make_weights" in declared)}
        return cls(**declared | learned | {"name": name, "doc": doc})

    @property
    def summary(self) -> str:
        """One sentence."""
        return " ".join(self.doc.split("\n\n")[0].split())

    @property
    def source(self) -> str:
        """An arXiv number or a repository, empty for a baseline."""
        named = re.search(r"arXiv:\d{4}\.\d{4,5}|github\.com/[\w.-]+/[\w-]+", self.doc)
        return named[0] if named else ""

    @property
    def reads_prompt(self) -> bool:
        """Does the prompt decide what stays?"""
        return bool(PROMPT_SIGNALS & set(self.needs))

    @cached_property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options."""
        prune = self.prune
        if prune is None and self.make_weights is not _unlearned:
            prune = get_type_hints(self.make_weights)["return"].prune
        return {
            parameter.name: parameter.default
            for function in (self.cuts, self.schedule, prune, self.attention_bias)
            if function
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
