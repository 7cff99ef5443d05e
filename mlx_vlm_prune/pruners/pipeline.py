"""One method with its options, and several methods after one another.

Shapes: B images, N visual tokens, K kept.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..inputs.budget import tokens_for
from .contract import Policy, Reduction, Signals, Stage, identity
from .image_budgets import REFERENCE, image_budgets
from .method import Method
from .numerics import NotFiniteError, all_finite, choice_dtype
from .observed import observe
from .reduction_check import check_reduction

# How many times as many tokens as the next method keeps an earlier one leaves: VScan's 96 for 64.
EARLIER_STEP_FACTOR = 1.5
# Signals of a decoder method, each with that of the tower which it is made of.
FROM_TOWER = {"cls_rank": "cls_attention"}


def layer_at(layer: float, depth: int) -> int:
    """A layer's number: below 1 a share of the depth, negative from the end.

    Papers count in models of 24 or 32 layers; a share carries "layer 2 of 32" to other depths.
    """
    inner = max(1, int(layer * depth + 0.5))
    number = min(inner, depth - 1) if 0 < layer < 1 else int(layer)
    if not -depth <= number < depth:
        raise UserError(f"layer is {layer:g}; there are layers 0 to {depth - 1}")
    return number % depth


@dataclass(frozen=True)
class Pruner:
    """A method with its options, ready to call on signals and a budget K."""

    name: str
    method: Method
    options: dict[str, Any] = field(default_factory=dict)
    weights: Any = None  # of a learned method: those of the checkpoint
    keep: float | None = None  # its own budget in a chain: tokens, or below 1 a share of them
    # Of the model's family, for options that are not given; the method's own for all others.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    enhancer: "Pruner | None" = None  # of the last in a chain: one that may complete its choice
    reference: float | None = None  # with budget=similarity: the spread of an image that keeps K

    @property
    def stage(self) -> Stage:
        return self.method.stage

    @property
    def is_proportional(self) -> bool:
        """Does a merged token count, in later attention, as often as it has members?"""
        return self.method.proportional

    @property
    def calibrates(self) -> bool:
        """Does an enhancer add to attention while prompts are read, and nothing later?"""
        calibrates: bool = self.call(self.method.calibrates)
        return calibrates

    @property
    def adapts(self) -> bool:
        """Does an image decide how many of its tokens leave at a cut inside the tower?"""
        adapts: bool = self.call(self.method.adapts)
        return adapts

    @property
    def completes(self) -> bool:
        """Does an enhancer choose part of the slots?"""
        return bool(self.method.complete) and (not self.method.attention_bias or self.calibrates)

    @property
    def needs(self) -> set[str]:
        """The signals that it reads, and those of the enhancer that completes its choice."""
        return {*self.method.needs, *(self.enhancer.method.needs if self.enhancer else ())}

    @property
    def has_dynamic_budget(self) -> bool:
        """Does each image get its own budget?"""
        return self.reference is not None or bool(self.options.get("dynamic"))

    def budgets(self, signals: Signals, encoded: Signals, K: int) -> list[int]:
        """Each image's budget, by its tokens as the tower gave them (`encoded`), or by those that
        are there; K is the mean over images like the reference, or like those of the training."""
        if self.reference is not None:
            return image_budgets(encoded.x_BND, K, self.reference)
        budgets: list[int] = self.weights.budgets(signals, K)
        return budgets

    @property
    def trained_tokens(self) -> int | None:
        """The one K that its weights were made for, where they were."""
        return self.method.trained_tokens(self.weights)

    def own_budget(self, N: int) -> int | None:
        """The K of N tokens that its options say, where they do. Raises UserError."""
        budget = self.method.own_budget
        return self.call(budget, self.weights, N) if budget else None

    @property
    def spec(self) -> str:
        """As it is written on the command line."""
        options = [f"{key}={value}" for key, value in self.options.items()]
        options += [f"keep={self.keep}"] if self.keep else []
        options += [] if self.reference is None else ["budget=similarity"]
        if self.reference not in (None, REFERENCE):
            options.append(f"reference={self.reference:g}")
        return self.name + (":" + ",".join(options) if options else "")

    def signal_layers(self, layers: int, more: int = 0) -> dict[str, int | None]:
        """The signals that it needs of a tower, with the layer of each or None.

        The features are the output of `layers` layers, behind which the tower has `more`.
        """
        values = {**self.method.options, **self.defaults, **self.options}
        step, last = int(bool(values.get("behind"))), layers - 1 + min(more, 1)
        needs = self.method.needs
        if self.stage is Stage.DECODER:
            needs = {FROM_TOWER[name]: needs[name] for name in needs if name in FROM_TOWER}
        try:
            return {
                name: None if option is None else min(layer_at(values[option], layers) + step, last)
                for name, option in needs.items()
                if name not in ("grid", "text", "features", "sensitivity")
            }
        except UserError as e:
            raise UserError(f"{self.name}: {e}") from None

    def options_for(self, function: Callable[..., Any]) -> dict[str, Any]:
        """The options that one of the method's functions takes, with those that training fixed."""
        names = inspect.signature(function).parameters
        fixed = self.method.fixed_options(self.weights)
        options = {**self.defaults, **self.options, **fixed}
        return {name: value for name, value in options.items() if name in names}

    def call(self, function: Callable[..., Any] | None, *arguments: Any) -> Any:
        """Call one of the method's functions with its options; a ValueError becomes a UserError
        that names the method, a NotFiniteError, which is none of its doing, stays."""
        assert function, f"{self.name} has no function for its stage"
        try:
            return function(*arguments, **self.options_for(function))
        except NotFiniteError:
            raise
        except ValueError as e:
            raise UserError(f"{self.name}: {e}") from None

    def __call__(self, signals: Signals, K: int) -> Reduction:
        """Reduce to K slots. K = N is the identity, bit for bit, for every method."""
        N = signals.x_BND.shape[1]
        if not (self.stage is not Stage.DECODER) <= K <= N:
            raise UserError(f"cannot keep {K} of {N} visual tokens; keep 1 to {N}")
        if K == N:
            return identity(signals.x_BND)
        if not K:
            return Reduction(index_BK=mx.zeros((len(signals.x_BND), 0), dtype=mx.uint32))
        if "grid" in self.method.needs and not signals.is_whole:
            raise UserError(f"{self.name} needs the whole image; put it first in the chain")
        is_finite = all_finite(signals.x_BND)
        if choice_dtype() == mx.float64:  # on the CPU, where looking costs nothing
            Reduction(is_finite=is_finite).check()
        # What a learned method mixes has gradients, see `AttentionPool`; a choice has none.
        known = signals if self.method.learned else signals.constant
        chosen = self.enhancer.call(self.enhancer.method.selected, K) if self.enhancer else K
        kept = self.call(self.method.prune or self.weights.prune, known, chosen)
        method = self.method.prune or type(self.weights).prune
        kept = check_reduction(self.name, method, kept, signals, chosen, is_finite)
        if self.enhancer and chosen < K:
            name, complete = self.enhancer.name, self.enhancer.method.complete
            kept = self.enhancer.call(complete, known, kept, K)
            assert complete, "call has checked it"
            kept = check_reduction(name, complete, kept, signals, K, is_finite)
        observe(self.name, signals, kept)
        return replace(kept, is_finite=is_finite)


@dataclass(frozen=True)
class StepBudgets:
    """How many of an image's N tokens each step of a chain leaves."""

    N: int
    K: int  # what the last step leaves; for a decoder method the average over layers
    per_step: tuple[tuple[Pruner, int], ...]  # each with how many it leaves

    def at(self, *stages: Stage) -> list[tuple[Pruner, int]]:
        """The steps of some stages, in order, with how many tokens each leaves."""
        return [(step, left) for step, left in self.per_step if step.stage in stages]

    def gives_back(self, step: Pruner) -> bool:
        """Do the tokens that leave the tower by this step come back at its end? They do where
        another step follows."""
        return step.method.give_back is not None and step is not self.per_step[-1][0]

    def whole_layers(self, step: Pruner, layers: int, more: int = 0) -> frozenset[int]:
        """The layers of a tower that attend to the tokens that leave by this step, too: those that
        it says and, where they come back, those of which other steps need signals."""
        whole = set(step.call(step.method.attends_to_all, layers))
        if self.gives_back(step):
            first, _, _ = step.call(step.method.cuts, layers, 2, 1)[0]
            others = [other for other, _ in self.per_step if other is not step]
            needed = {i for s in others for i in s.signal_layers(layers, more).values()}
            whole |= {i for i in needed if i is not None and i >= first}
        return frozenset(whole)

    @property
    def handed_on(self) -> list[int]:
        """How many tokens each step hands to the next."""
        numbers = [self.N]
        for step, left in self.per_step:
            numbers.append(numbers[-1] if self.gives_back(step) else left)
        return numbers[1:]

    def left_after(self, stage: Stage, n: int) -> int:
        """How many of n tokens are left after the steps of a stage."""
        return min([n, *(left for step, left in self._each() if step.stage is stage)])

    @property
    def before_last(self) -> int:
        """How many tokens the last step is given."""
        return [self.N, *self.handed_on][-2]

    @property
    def before_layers(self) -> int:
        """How many tokens the language model is given."""
        return min([self.N, *(left for step, left in self._each() if step.stage < Stage.DECODER)])

    def _each(self) -> list[tuple[Pruner, int]]:
        """The steps, with how many tokens each hands on."""
        return [(s, left) for (s, _), left in zip(self.per_step, self.handed_on, strict=True)]


@dataclass(frozen=True)
class Pipeline:
    """Methods in the order of their stages.

    `enhancer` is the one that adds to attention; the one that completes a choice is the last
    method's own, and may be the same.
    """

    steps: tuple[Pruner, ...]
    enhancer: Pruner | None = None
    policy: Policy | None = None  # of positions, in place of the last method's

    @classmethod
    def of(cls, pruner: "Pruner | Pipeline") -> "Pipeline":
        return pruner if isinstance(pruner, Pipeline) else cls((pruner,))

    @property
    def spec(self) -> str:
        """As it is written on the command line."""
        return "+".join(step.spec for step in (*self.steps, *self.enhancers))

    @property
    def enhancers(self) -> tuple[Pruner, ...]:
        """Those of the chain: what completes the last choice first."""
        completing, adding = self.steps[-1].enhancer, self.enhancer
        return tuple(filter(None, (completing, None if adding == completing else adding)))

    def with_defaults(self, defaults: Mapping[str, Mapping[str, Any]]) -> "Pipeline":
        """The same with other defaults of options, by the method's name."""
        steps = [replace(step, defaults=defaults.get(step.name, {})) for step in self.steps]
        return replace(self, steps=tuple(steps))

    @property
    def has_dynamic_budget(self) -> bool:
        """Does some step give each image a budget of its own?"""
        return any(step.has_dynamic_budget for step in self.steps)

    @property
    def trained_tokens(self) -> int | None:
        """The one K that the last step's weights were made for, where they were."""
        return self.steps[-1].trained_tokens

    def own_budget(self, N: int) -> int | None:
        """The K of N tokens that the last step's options say, where they do. Raises UserError."""
        return self.steps[-1].own_budget(N)

    @property
    def positions(self) -> Policy:
        """`policy`, or that of the last method's paper; `keep` with an enhancer."""
        return self.policy or ("keep" if self.enhancers else self.steps[-1].method.positions)

    def at(self, *stages: Stage) -> list[Pruner]:
        return [step for step in self.steps if step.stage in stages]

    @property
    def decoder(self) -> Pruner | None:
        return next(iter(self.at(Stage.DECODER)), None)

    def signal_layers(self, layers: int, more: int = 0) -> dict[str, int | None]:
        """The signals that all steps together need of the tower, with their layers."""
        layer_of: dict[str, int | None] = {}
        for step in self.steps:
            for name, layer in step.signal_layers(layers, more).items():
                if layer_of.setdefault(name, layer) != layer:
                    raise UserError(f"{self.spec}: {name} is needed of two different layers")
        if self.enhancer and self.at(Stage.ENCODER):
            layer_of["represented"] = None
        return layer_of

    @property
    def ranks_by_cls(self) -> bool:
        """Does the decoder method need to know how much attention from CLS tokens got?"""
        return bool(self.decoder and "cls_rank" in self.decoder.method.needs)

    def needs_signal(self, signal: str) -> bool:
        return any(signal in step.needs for step in self.steps)

    def budgets(self, N: int, K: int) -> StepBudgets:
        """How many tokens each step leaves; the last leaves K, or K in the average layer."""
        *earlier, last = self.steps
        per_step, n = [], N
        for i, step in enumerate(earlier):
            usual = int(K * EARLIER_STEP_FACTOR ** (len(earlier) - i) + 0.5)
            if step.method.leaves:
                usual = step.call(step.method.leaves, n, K)
            keep = step.keep and (int(step.keep) or tokens_for(N, step.keep))
            left = min(N, step.trained_tokens or keep or usual)
            per_step.append((step, N if K == N else left))
            n = n if step.method.give_back else min(n, left)
        return StepBudgets(N, K, (*per_step, (last, K)))
