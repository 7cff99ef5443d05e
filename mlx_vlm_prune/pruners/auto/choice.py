"""The choice of `auto`: a method and a budget, and one line that says why.

Where an evaluation of the very model is known, the methods within a point of the best at this share
of the tokens are worth choosing, and of them the one that answers sooner here, where that was
timed; else the one that is best over all shares. None is chosen that is below a baseline. Without
an evaluation the published order holds. Nothing is pruned where all tokens stay, or where the
calibrations of this machine say that the first token would come no sooner.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...inputs.budget import DEFAULT_KEEP_RATIO, check_budget
from ...machine.hardware import on_cuda
from .. import METHODS, PRESETS
from ..contract import Stage
from .caution import Pictures, cautious
from .evidence import Evidence, evidence_of
from .measured import FirstToken, first_tokens
from .reasons import CLIPS, PUBLISHED, Published

WORTH, ALIKE = 0.01, 0.005  # a point below the best; half a point is no difference
NONE = "none"


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before it is asked.

    `kind` is its family, `folder` the place whose evaluations and calibrations hold for it (None
    for none), `layers` those of its language model, `N` the visual tokens of every image, None
    where images differ. `can` says whether it can do a method at a share of the tokens (None: not
    known yet). Only calibrations of its `dtype` hold, any where that is not known.
    """

    kind: str
    folder: Path | None
    has_cls: bool
    layers: int
    N: int | None
    can: Callable[[str, float | None], bool]
    dtype: mx.Dtype | None = None


@dataclass(frozen=True)
class AutoChoice:
    """A method with its budget, as options of `generate`, and why."""

    pruner: str
    keep_ratio: float | None
    keep_tokens: int | None
    why: str

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        names = ("pruner", "keep_ratio", "keep_tokens")
        return {name: getattr(self, name) for name in names}

    @property
    def line(self) -> str:
        """What was chosen and why, in a line."""
        return f"auto: {self.pruner}: {self.why}"


def choose(
    facts: ModelFacts, keep_ratio: float | None, keep_tokens: int | None,
    prompt: str | None = None, pictures: Pictures = tuple, *, is_timed: bool = True,
    in_tower: bool = False,
) -> AutoChoice:  # fmt: skip
    """The method, and what it keeps, by default half; with a `prompt` more where that asks for what
    loses most, or one of `pictures` is a document.

    With `is_timed` nothing is pruned where that gains no time here. With `in_tower` the method is
    one that shortens the tower, or `none` where no such is worth it. Raises UserError for a budget
    that cannot be.
    """
    check_budget(keep_ratio, keep_tokens)
    if keep_ratio is None and keep_tokens is None:
        keep_ratio = DEFAULT_KEEP_RATIO
    more = None
    if prompt is not None:
        more = cautious(prompt, keep_ratio, keep_tokens, facts.N, pictures)
    if more:
        keep_ratio, keep_tokens = more.keep_ratio, more.keep_tokens
    evidence = evidence_of(facts.folder)
    share = _share(keep_ratio, keep_tokens, facts.N or (evidence.tokens if evidence else None))
    if share is not None and share >= 1:
        if keep_ratio is not None or facts.N or not evidence:
            return AutoChoice(NONE, None, None, "all visual tokens stay")
        share = evidence.shares[-1]  # an image may have more tokens than those evaluated
    times = first_tokens(facts.folder, facts.dtype) if is_timed else {}
    if evidence and share is not None:
        pruner, why = by_evidence(facts, evidence, share, times, in_tower)
    else:
        pruner, why = by_order(facts, share, times, in_tower)
    if pruner == NONE:
        return AutoChoice(NONE, None, None, why)
    why = f"{why}; {more.note}" if more else why
    return AutoChoice(pruner, keep_ratio, keep_tokens, why)


def choose_for_clip(keep_ratio: float | None, keep_tokens: int | None) -> AutoChoice:
    """The method for a clip, by what is published, and what it keeps, by default half.

    Raises UserError for a budget that cannot be.
    """
    check_budget(keep_ratio, keep_tokens)
    if keep_ratio is None and keep_tokens is None:
        keep_ratio = DEFAULT_KEEP_RATIO
    if keep_ratio == 1:
        return AutoChoice(NONE, None, None, "all visual tokens stay")
    why = f"{CLIPS.why} ({CLIPS.source})"
    return AutoChoice(CLIPS.pruner, keep_ratio, keep_tokens, why)


def _share(keep_ratio: float | None, keep_tokens: int | None, N: int | None) -> float | None:
    """The share of an image's tokens that a budget keeps; None where that is not known."""
    if keep_ratio is not None:
        return keep_ratio
    return keep_tokens / N if keep_tokens is not None and N else None


def by_evidence(
    facts: ModelFacts, evidence: Evidence, share: float, times: Mapping[str, FirstToken],
    in_tower: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """The method by an evaluation of the model, and why."""
    worth: dict[str, float] = {}
    for name, figure in evidence.ranked(share):
        if worth and figure < max(worth.values()) - WORTH:
            break
        if name != NONE and works_in_tower(name) >= in_tower and facts.can(name, share):
            worth[name] = figure
    sooner = {name: worth[name] for name in worth if not _is_slow(name, share, times)}
    if not worth:
        return NONE, f"none is worth it in {evidence.about}"
    if not sooner:
        return NONE, _no_gain(share, times, worth)
    best = max(sooner.values())

    def preference(name: str) -> tuple[float, float]:
        relative = times[name].relative(share) if name in times else 1.0
        return relative, -evidence.mean(name)

    chosen = min((name for name in sooner if sooner[name] >= best - ALIKE), key=preference)
    random, more = evidence.random(share), ""
    if random is not None:
        more = f", random {random:.1%}"
    if chosen in times:
        more += f"; here the first token takes {times[chosen].relative(share):.0%} of its time"
    return chosen, (
        f"{sooner[chosen]:.1%} right {evidence.where(share)} in {evidence.about}, all tokens"
        f" {evidence.full:.1%}{more}"
    )


def by_order(
    facts: ModelFacts, share: float | None, times: Mapping[str, FirstToken], in_tower: bool = False
) -> tuple[str, str]:
    """The method by the published order, and why."""
    fits = [line for line in PUBLISHED if line.in_tower is in_tower and _fits(line, facts)]
    able = [line for line in fits if facts.can(line.pruner, share)]
    sooner = [
        line for line in able if share is None or not _is_slow(line.pruner, share, times)
    ]  # fmt: skip
    if not sooner and able and share is not None:
        return NONE, _no_gain(share, times, (line.pruner for line in able))
    if not sooner:
        return NONE, "no method of the published order works in this model"
    return sooner[0].pruner, (
        f"by the published order, since no evaluation of this {facts.kind} model is known"
        f" (`mlx-vlm-prune evaluate` makes one): {sooner[0].why} ({sooner[0].source})"
    )


def _fits(line: Published, facts: ModelFacts) -> bool:
    """Is a line about such a model, on MLX's device?"""
    is_of_kind = not line.kinds or facts.kind in line.kinds
    if line.on_cuda and not on_cuda():
        return False
    return is_of_kind and facts.has_cls >= line.has_cls and facts.layers >= line.least_layers


def works_in_tower(spec: str) -> bool:
    """Does a method, or one of a chain, shorten the tower?"""
    names = (part.partition(":")[0] for part in PRESETS.get(spec, spec).split("+"))
    stages = (METHODS[name].stage for name in names if name in METHODS)
    return any(stage in (Stage.IMAGE, Stage.ENCODER) for stage in stages)


def _is_slow(name: str, share: float, times: Mapping[str, FirstToken]) -> bool:
    """Is it known that the first token comes no sooner?"""
    return name in times and times[name].relative(share) >= 1


def _no_gain(share: float, times: Mapping[str, FirstToken], names: Iterable[str]) -> str:
    """What is said where each of these methods is slow."""
    part, name = min((times[name].relative(share), name) for name in names)
    return (
        f"nothing is gained: by the calibrations of this machine the first token takes {part:.0%}"
        f" of its time with {share:.3g} of the tokens ({name})"
    )
