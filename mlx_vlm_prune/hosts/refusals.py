"""Which methods cannot work in a model of mlx-vlm's, each with the reason."""

from typing import Any

from ..checkpoints.errors import UserError
from ..pruners import Pipeline, Pruner, Stage
from ..pruners.contract import Policy
from .families import Family

LATER = "not yet in mlx-vlm models"
REASONS = {
    Stage.IMAGE: f"it makes the pixels fewer, {LATER}; --resize-shape makes the picture smaller",
}
INNER = ("before", "normed", "held_keys", "last_attention", "next_attention")  # what layers tell
TOWER = ("patches", "pixels", "text", "grid")  # what needs no attention


def check(model: Any, family: Family, pipeline: Pipeline, positions: Policy | None) -> Policy:
    """The position policy that holds; UserError where a method or policy cannot work."""
    kind = model.config.model_type
    if positions not in (None, "keep", "renumber"):
        raise UserError(f"--positions is {positions!r}; it is keep or renumber")
    if "get_input_embeddings" in vars(model):
        raise UserError("this model is being pruned already: leave that block first, or load the"
                        " folder that a pruned one was made from")  # fmt: skip
    for step in pipeline.steps:
        reason = family.inside if step.stage is Stage.ENCODER else REASONS.get(step.stage)
        reason = _inner(family, step) if step.stage is Stage.DECODER else reason
        if reason:
            raise UserError(f"{step.name} cannot prune a {kind} model: {reason}")
        needs = set() if step.stage is Stage.DECODER else set(step.method.needs)
        if needs - set(TOWER) and not family.depth(model):
            raise UserError(
                f"{step.name} cannot prune a {kind} model: its tower has neither a CLS token nor"
                " attention that could stand in for it"
            )
    if layers := family.depth(model):
        pipeline.want(layers)  # a layer that is not there is refused before any picture is seen
    if pipeline.enhancer:
        raise UserError(
            f"{pipeline.enhancer.name} cannot work in a {kind} model: it adds to the attention"
            f" that kept tokens get, {LATER}"
        )
    if family.has_mrope or pipeline.decoder:
        return positions or pipeline.positions
    if positions == "keep":
        raise UserError(
            f"--positions keep cannot be had in a {kind} model: it counts the rows it is given;"
            " leave the option out"
        )
    return "renumber"


def _inner(family: Family, step: Pruner) -> str | None:
    """Why a method cannot work between the language model's layers."""
    if family.inner is None:
        return f"it works between the language model's layers, {LATER} of this kind"
    if step.is_proportional:
        return f"it adds to the attention that merged tokens get, {LATER}"
    if set(step.method.needs) - set(INNER):
        return f"it needs {', '.join(sorted(set(step.method.needs) - set(INNER)))}, {LATER}"
    return None
