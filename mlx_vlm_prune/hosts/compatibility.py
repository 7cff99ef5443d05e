"""Which methods work in which of mlx-vlm's models, and why others do not."""

from collections.abc import Mapping
from typing import Any

from ..checkpoints.errors import UserError
from ..pruners import Pipeline, Pruner, Stage
from ..pruners.contract import Policy
from .host import Host

LATER = "not yet in mlx-vlm models"
SLOTS_OF_TILES = "it makes a number of slots from a picture, and an image may be cut into several"
SHRINKS_IMAGE = f"it makes the pixels fewer, {LATER}; resize_shape makes the picture smaller"
NO_PIXELS = f"it needs the pixels of patches after the tower, {LATER}"
BETWEEN_LAYERS = "it works between the language model's layers, and {}"
WITHOUT_ATTENTION = "its tower has neither a CLS token nor attention that could stand in for it"
# What a host has between the language model's layers, and what a tower without attention has.
DECODER_SIGNALS = (
    "before", "normed", "held_keys", "last_attention", "next_attention", "text_attention",
    "text_share", "mean_attention", "cls_rank", "entrance", "held_values", "rotation",
)  # fmt: skip
ATTENTION_FREE_SIGNALS = ("text", "grid", "features", "sensitivity")


def check_pipeline(host: Host, pipeline: Pipeline, positions: Policy | None) -> Policy:
    """The position policy that holds.

    Raises UserError where a method or a policy cannot work in this model.
    """
    kind = host.kind
    if positions not in (None, "keep", "renumber"):
        raise UserError(f"positions is {positions!r}; it is keep or renumber")
    if "get_input_embeddings" in vars(host.model):
        raise UserError(
            "this model is being pruned already: leave that block first, or load the folder that"
            " a pruned one was made from"
        )
    for step in [*pipeline.steps, *pipeline.enhancers]:
        if reason := _why_not(host, step):
            raise UserError(f"{step.name} cannot prune a {kind} model: {reason}")
    if pipeline.enhancer and pipeline.decoder:
        raise UserError(
            f"{pipeline.enhancer.name} cannot follow {pipeline.decoder.name}, {LATER}: layers with"
            " fewer rows share no mask with the others"
        )
    if layers := host.depth:
        pipeline.signal_layers(layers)  # refuses one that does not exist, before images are read
    if host.has_mrope or pipeline.decoder:
        return positions or pipeline.positions
    if positions == "keep":
        raise UserError(
            f"positions='keep' is not possible in a {kind} model: it counts the rows it is given;"
            " leave the option out"
        )
    return "renumber"


def check_cache_options(host: Host, pipeline: Pipeline, options: Mapping[str, Any]) -> None:
    """Raises UserError for a cache that this model or this method cannot have."""
    check_kv_bits(host, pipeline, options.get("kv_bits"))
    check_max_kv_size(host, pipeline, options.get("max_kv_size"))


def check_kv_bits(host: Host, pipeline: Pipeline, kv_bits: float | None) -> None:
    """Raises UserError for a fraction of bits with a decoder method: mlx-vlm has those in a kind of
    cache whose positions cannot be shifted."""
    if not pipeline.decoder or kv_bits is None:
        return
    assert host.language_layers is not None, "`check_pipeline` comes first"
    if host.language_layers.axes == 1 and kv_bits % 1:
        raise UserError(
            f"kv_bits is {kv_bits:g}; with {pipeline.decoder.name} a whole number can be had"
        )


def check_max_kv_size(host: Host, pipeline: Pipeline, max_kv_size: int | None) -> None:
    """Raises UserError for a cache that forgets rows, where the model or a method has its own."""
    if max_kv_size is None:
        return
    if hasattr(host.language, "make_cache"):
        raise UserError(f"max_kv_size is not possible in a {host.kind} model: it makes its caches")
    if step := pipeline.decoder or pipeline.enhancer:
        raise UserError(f"max_kv_size is not possible with {step.name}, {LATER}; leave it out")


def why_not_enhance(host: Host | type[Host], enhancer: Pruner) -> str | None:
    """Why an enhancer cannot work in a model or a family; None where it can."""
    if reason := _why_no_rotation(host, enhancer):
        return reason
    if not enhancer.method.attention_bias:
        return None
    if host.why_no_enhancer or not enhancer.calibrates:
        return host.why_no_enhancer
    return (
        f"it adds something else in each layer, and mlx-vlm's share a mask: not as {enhancer.spec}"
    )


def _why_no_rotation(host: Host | type[Host], step: Pruner) -> str | None:
    """Why a method cannot read how the language model rotates; None where it can, or need not."""
    if "rotation" not in step.method.needs or host.language_layers_class:
        return None
    return f"it reads how the language model's layers rotate, and {host.why_no_decoder_methods}"


def _why_not(host: Host, step: Pruner) -> str | None:
    """Why a method cannot work in this model; None where it can."""
    if reason := why_not_in_family(host, step):
        return reason
    if step.stage is Stage.DECODER:
        needs_attention = "cls_rank" in step.method.needs
    else:
        is_behind = step.stage in (Stage.FEATURES, Stage.PROJECTED)
        needs_attention = is_behind and bool({*step.method.needs} - {*ATTENTION_FREE_SIGNALS})
    return WITHOUT_ATTENTION if needs_attention and not host.depth else None


def why_not_in_family(family: Host | type[Host], step: Pruner) -> str | None:
    """Why a method can work in no model of a family; None where it can in one whose tower has
    attention."""
    if step.stage is Stage.IMAGE:
        return SHRINKS_IMAGE
    if step.stage is Stage.ENCODER:
        return family.why_no_encoder_methods
    if step.stage is Stage.ENHANCER:
        return why_not_enhance(family, step)
    if step.stage is Stage.DECODER:
        return _why_not_between_layers(family, step)
    if step.trained_tokens and family.has_tiles:
        return SLOTS_OF_TILES
    if step.method.probe and family.why_no_probe:
        return family.why_no_probe
    if "pixels" in step.method.needs:
        return NO_PIXELS
    return _why_no_rotation(family, step)


def _why_not_between_layers(family: Host | type[Host], step: Pruner) -> str | None:
    layers = family.language_layers_class
    if layers is None:
        return BETWEEN_LAYERS.format(family.why_no_decoder_methods)
    if (step.is_proportional or step.method.entry_bias) and layers.has_window:
        return "it adds to the attention that some tokens get, which windows of rows would cut off"
    if beyond := set(step.method.needs) - set(DECODER_SIGNALS):
        return f"it needs {', '.join(sorted(beyond))}, {LATER}"
    return None
