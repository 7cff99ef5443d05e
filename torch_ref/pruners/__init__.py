"""Every method in PyTorch, from its formulas: one file each, with the same name and options.

`reduce` checks the budget and answers K = N itself, as `Pruner` in mlx_vlm_prune does.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mlx_vlm_prune.checkpoints.errors import UserError

from .contract import Reduction, Signals, layer_at
from .image_budgets import by_similarity

NAMES = {
    "image": "downsample",
    "encoder": "tome patch_norm kq_norm pixelprune docprune ipcv illava_tower flowcut window_merge",
    "features": "none random uniform avgpool norm similarity received_attention cls_attention"
    " visionzip vispruner prumerge prumerge_plus hiprune prunesid attention_pool"
    " score_prune mlp learn_prune salience_coverage scope apet",
    "projected": "holov global_local divprune two_scales zoo_prune cdpruner mmtok evs vidcom2"
    " flashvid",
    "decoder": "fastv pyramiddrop sparsevlm dual_attention lookahead dart v2drop vtw pact ivc_prune"
    " twig illava_decoder",
    "enhancer": "restore ivc",
}
STAGES: dict[str, dict[str, ModuleType]] = {
    stage: {name: import_module(f".{name}", __name__) for name in names.split()}
    for stage, names in NAMES.items()
}
METHODS = {name: method for stage in STAGES.values() for name, method in stage.items()}

__all__ = [
    "METHODS",
    "STAGES",
    "Reduction",
    "Signals",
    "Step",
    "is_learned",
    "probed",
    "reduce",
    "signal_layers",
]

# What holds where a method's file lacks a name.
DEFAULTS: dict[str, Any] = {
    "needs": {},  # the tokens alone
    "prune": None,  # its weights have it
    "probe": None,  # of the projector
    "proportional": False,
    "give_back": None,
    "make_weights": None,  # none, or the model makes them
    "learned": False,
    "training_factor": None,
    "fixed_options": lambda weights: {},
}


def entry(method: ModuleType, name: str) -> Any:
    """A name of a method's file, or the default."""
    return vars(method).get(name, DEFAULTS[name])


def is_learned(name: str) -> bool:
    """Does it come with weights?"""
    method = METHODS[name]
    return entry(method, "learned") or entry(method, "make_weights") is not None


@dataclass(frozen=True)
class Step:
    """A method with its options and weights, and how many tokens it leaves (None: the whole
    budget)."""

    name: str
    K: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    weights: Any = None
    gives_back: bool = False  # do tokens that leave the tower come back at its end?
    reference: float | None = None  # with budget=similarity

    @property
    def method(self) -> ModuleType:
        return METHODS[self.name]

    @property
    def stage(self) -> str:
        return next(stage for stage, methods in STAGES.items() if self.name in methods)

    @property
    def training_factor(self) -> Any:
        """On the attention of tokens, in training; None where its `prune` has gradients."""
        return entry(self.method, "training_factor")

    @property
    def merges(self) -> bool:
        """Does a merged token count, in later attention, as often as it has members?"""
        return entry(self.method, "proportional")

    def image_budgets(self, signals: Signals, encoded: Signals, K: int) -> list[int]:
        """How many tokens each image keeps; all where K is all."""
        if encoded.x_BND.shape[1] <= K:
            return [K] * len(encoded.x_BND)
        if self.reference is not None:
            return [by_similarity(x_ND, K, self.reference) for x_ND in encoded.x_BND]
        if self.options.get("dynamic"):
            return self.weights.budgets(signals, K)
        return [K] * len(signals.x_BND)

    def one_budget(self, signals: Signals, encoded: Signals, K: int) -> int:
        """What images that are reduced together keep. Raises UserError where that differs."""
        budgets = set(self.image_budgets(signals, encoded, K))
        if len(budgets) > 1:
            raise UserError(f"images that keep {sorted(budgets)} are recomputed one at a time")
        return budgets.pop()

    @property
    def adapts(self) -> bool:
        """Does an image decide how many of its tokens leave at a cut inside the tower?"""
        return "adapts" in vars(self.method) and bool(self.call("adapts"))

    def call(self, function: str, *arguments: Any) -> Any:
        """Call one of the method's functions with the options that it takes, and with those that
        training fixed."""
        called = vars(self.method)[function]
        names = inspect.signature(called).parameters
        options = dict(self.options)
        if self.weights is not None:
            options |= entry(self.method, "fixed_options")(self.weights)
        return called(*arguments, **{k: v for k, v in options.items() if k in names})


def reduce(name: str, signals: Signals, K: int, weights: Any = None, **options: Any) -> Reduction:
    """K of N slots by the method `name`, chosen on the CPU in float64; K = N is the identity.

    `weights` are a learned method's. Raises ValueError for a budget outside 1 to N
    (0 to N in the decoder).
    """
    B, N, _ = signals.x_BND.shape
    device = signals.x_BND.device
    if device.type != "cpu" and name != "attention_pool" and K < N:
        weights = None if weights is None else copy.deepcopy(weights).cpu()
        return reduce(name, signals.constant.to("cpu"), K, weights, **options).to(device)
    step = Step(name, K, options)
    if not (step.stage != "decoder") <= K <= N:
        raise ValueError(f"cannot keep {K} of {N} visual tokens; keep 1 to {N}")
    if K == N:
        return Reduction(torch.arange(N, device=signals.x_BND.device).expand(B, N))
    if weights is not None:
        return weights.prune(signals, K, **options)
    return step.call("prune", signals.constant, K)


def probed(
    steps: Sequence[Step], project: Callable[[Tensor], Tensor], features_BND: Tensor
) -> Tensor | None:
    """How sensitive a projector is to each token, where a method asks."""
    for step in steps:
        if step.stage == "projected" and entry(step.method, "probe"):
            return step.call("probe", project, features_BND)
    return None


def signal_layers(step: Step, layers: int, more: int = 0) -> dict[str, int | None]:
    """The signals that a method needs of a tower of so many layers and some behind the features,
    with the layer of each or None."""
    layer_of: dict[str, int | None] = {}
    prune = entry(step.method, "prune") or step.weights.prune
    names = inspect.signature(prune).parameters
    behind = "behind" in names and step.options.get("behind", names["behind"].default)
    for name, option in entry(step.method, "needs").items():
        layer_of[name] = None
        if option is not None:
            number = layer_at(step.options.get(option, names[option].default), layers)
            is_there = number + 1 < layers or more > 0
            layer_of[name] = number + 1 if behind and is_there else number
    if step.stage == "decoder":  # of whose signals one alone comes from the tower
        return {"cls_attention": layer_of["cls_rank"]} if "cls_rank" in layer_of else {}
    return layer_of
