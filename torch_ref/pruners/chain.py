"""A chain's steps by what they do, and one step with the enhancer that completes its choice."""

from collections.abc import Sequence

from . import Reduction, Signals, Step, reduce


def selecting(steps: Sequence[Step]) -> list[Step]:
    """The steps but for enhancers."""
    return [step for step in steps if step.stage != "enhancer"]


def adding(steps: Sequence[Step]) -> Step | None:
    """The enhancer of a chain that adds to attention."""
    return next((step for step in steps if hasattr(step.method, "attention_bias")), None)


def completing(steps: Sequence[Step]) -> Step | None:
    """The enhancer of a chain that chooses some of the slots."""
    some = [step for step in steps if hasattr(step.method, "complete")]
    adding_too = [step for step in some if hasattr(step.method, "attention_bias")]
    return next((s for s in some if s not in adding_too or s.call("calibrates")), None)


def choose(step: Step, signals: Signals, K: int, completed_by: Step | None = None) -> Reduction:
    """K slots by a method, and by an enhancer that completes its choice."""
    chosen = K
    if completed_by and signals.x_BND.shape[1] > K:
        chosen = completed_by.call("selected", K)
    kept = reduce(step.name, signals, chosen, step.weights, **step.options)
    if completed_by and chosen < K:
        whole = completed_by.call("complete", signals.to("cpu"), kept.to("cpu"), K)
        kept = whole.to(signals.x_BND.device)
    return kept
