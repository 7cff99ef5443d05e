"""Steps from what a user types: NAME, NAME:option=value,… or NAME+NAME."""

import inspect
from collections.abc import Sequence
from typing import Any

from mlx_vlm_prune.checkpoints.command_line import suggestion
from mlx_vlm_prune.checkpoints.errors import UserError

from . import METHODS, Step

PRESETS = {
    "duet": "visionzip+pyramiddrop:start=0.5,stages=2",
    "vscan": "global_local+fastv:layer=0.5",
    "mustdrop": "window_merge+dual_attention",
    "hilo": "two_scales+lookahead",
}
RENUMBERED = ("pyramiddrop", "sparsevlm", "dual_attention")  # in their papers
EARLIER_STEP_FACTOR = 1.5  # of the budget, for each step of a chain that comes after


def parse_steps(spec: str, N: int, K: int) -> list[Step]:
    """The steps of a chain that leaves K of N tokens; an earlier one leaves more.

    Raises UserError for an unknown name or option, or a value of the wrong kind.
    """
    parts = [part for name in spec.split("+") for part in PRESETS.get(name, name).split("+")]
    parsed = [_parse(part) for part in parts]
    reducing = [step for step in parsed if step.stage != "enhancer"]
    steps = []
    for i, step in enumerate(reducing):
        later = len(reducing) - 1 - i
        usual = int(K * EARLIER_STEP_FACTOR**later + 0.5)
        keep = step.options.pop("keep", None) or usual
        left = K if K == N or not later else min(N, keep)
        steps.append(Step(step.name, left, step.options, reference=step.reference))
    return steps + [step for step in parsed if step.stage == "enhancer"]


def positions(steps: Sequence[Step]) -> str:
    """The position policy of the last method's paper; `keep` with an enhancer."""
    is_enhanced = any(step.stage == "enhancer" for step in steps)
    return "renumber" if steps[-1].name in RENUMBERED and not is_enhanced else "keep"


def _parse(part: str) -> Step:
    name, _, listed = part.partition(":")
    if name not in METHODS:
        raise UserError(f"no pruner is called {name!r}; {suggestion(name, [*METHODS, *PRESETS])}")
    known = {"keep": 1, "budget": "", "reference": 0.65, **_options(name)}
    options: dict[str, Any] = {}
    for pair in filter(None, listed.split(",")):
        key, equals, value = pair.partition("=")
        if key not in known:
            raise UserError(f"{name} has no option {key!r}; {suggestion(key, known)}")
        options[key] = _value(name, key, value if equals else "true", type(known[key]))
    reference = options.pop("reference", 0.65)
    by_similarity = options.pop("budget", "") == "similarity"
    return Step(name, None, options, reference=reference if by_similarity else None)


def _options(name: str) -> dict[str, Any]:
    """The options of a method, with their defaults."""
    functions = [f for f in vars(METHODS[name]).values() if inspect.isfunction(f)]
    classes = [c.prune for c in vars(METHODS[name]).values() if hasattr(c, "prune")]
    return {
        p.name: p.default
        for f in (*functions, *classes)
        for p in inspect.signature(f).parameters.values()
        if isinstance(p.default, int | float)
    }


def _value(name: str, key: str, value: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        return kind(value)
    except (KeyError, ValueError):
        raise UserError(f"option {key} of {name} takes a {kind.__name__}, not {value!r}") from None
