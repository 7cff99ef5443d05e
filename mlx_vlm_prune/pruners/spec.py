"""Parse what a user types: NAME, NAME:option=value,… or NAME+NAME."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..checkpoints.command_line import program, suggestion
from ..checkpoints.errors import UserError
from .contract import Stage
from .image_budgets import REFERENCE
from .method import CHAIN_OPTIONS, Method
from .pipeline import Pipeline, Pruner

AUTO = "auto"  # no method: one is chosen for a model and a budget, see auto/


def parse(
    spec: str,
    methods: Mapping[str, Method],
    presets: Mapping[str, str],
    learned: Mapping[str, Any],
) -> Pipeline:
    """The methods that a specification names, in the order of their stages.

    `learned` holds the weights that the checkpoint has of learned methods, by name.
    Raises UserError for an unknown name or option, a value of the wrong type, or methods that do
    not chain.
    """
    spec = "+".join(presets.get(part, part) for part in spec.split("+"))
    pruners = [_parse_pruner(part, methods, presets, learned) for part in spec.split("+")]
    steps = tuple(p for p in pruners if p.stage is not Stage.ENHANCER)
    enhancers = [p for p in pruners if p.stage is Stage.ENHANCER]
    completing = [p for p in enhancers if p.completes]
    adding = [p for p in enhancers if p.method.attention_bias]
    in_decoder = [p for p in steps if p.stage is Stage.DECODER]
    if any(len(kind) > 1 for kind in (completing, adding, in_decoder)):
        raise UserError(f"{spec} has two methods of a kind of which a chain can hold one")
    if not steps:
        raise UserError(f"{spec} makes a selector better and needs one, as in cls_attention+{spec}")
    if enhancers and steps[-1].stage is Stage.IMAGE:
        raise UserError(f"{spec}: a smaller image leaves nothing to restore")
    if steps[-1].keep is not None:
        raise UserError(
            f"{spec}: keep= is what an earlier method of a chain leaves to the next; the last keeps"
            " what keep_tokens or keep_ratio says"
        )
    if len(steps) > 1 and any(p.name == "none" for p in steps):
        raise UserError(f"{spec}: none prunes nothing; leave it out of the chain")
    if [p.stage for p in steps] != sorted(p.stage for p in steps):
        order = "+".join(p.spec for p in sorted(steps, key=lambda p: p.stage))
        raise UserError(f"{spec} is not in the order of the stages; write {order}")
    for enhancer in completing:
        _check_completed(steps[-1], enhancer)
        steps = (*steps[:-1], replace(steps[-1], enhancer=enhancer))
    return Pipeline(steps, adding[0] if adding else None)


def _check_completed(last: Pruner, enhancer: Pruner) -> None:
    """Raises UserError where an enhancer cannot complete the choice of a chain's last method."""
    if enhancer.calibrates and last.stage is Stage.DECODER:
        raise UserError(
            f"{enhancer.spec} works ahead of the language model, and {last.name} inside it"
        )
    if last.stage is Stage.ENCODER:
        raise UserError(f"{enhancer.spec} works after the tower, and {last.name} inside it")
    if trained := last.trained_tokens:
        raise UserError(
            f"{enhancer.spec} leaves its selector part of the budget, and {last.name} was trained"
            f" for {trained} visual tokens"
        )


def _parse_pruner(
    part: str,
    methods: Mapping[str, Method],
    presets: Mapping[str, str],
    learned: Mapping[str, Any],
) -> Pruner:
    name, _, listed = part.partition(":")
    if name == AUTO:
        raise UserError("auto chooses a method by itself, where a model is asked; here name one")
    if name not in methods:
        raise unknown_pruner(name, [*methods, *presets])
    method = methods[name]
    known = method.options
    options: dict[str, Any] = {}
    for pair in filter(None, listed.split(",")):
        key, equals, value = pair.partition("=")
        if key in CHAIN_OPTIONS:
            options[key] = _chain_option(name, key, value)
            continue
        if key not in known:
            rest = suggestion(key, known) if known else "it has none"
            raise UserError(f"{name} has no option {key!r}; {rest}")
        options[key] = _option_value(name, key, value if equals else "true", known[key])
    keep, reference = options.pop("keep", None), _reference(method, options)
    if not method.learned:
        return Pruner(name, method, options, keep=keep, reference=reference)
    if name not in learned:
        raise UserError(f"{name} is learned, and this checkpoint holds no weights for it")
    for key, value in method.fixed_options(learned[name]).items():
        if options.get(key, value) != value:
            raise UserError(f"{name} was trained for {key}={value}; leave {key} out")
    pruner = Pruner(name, method, options, learned[name], keep, reference=reference)
    if reference is not None and (trained := pruner.trained_tokens):
        raise UserError(f"{name} was trained for {trained} visual tokens; leave budget out")
    return pruner


def _chain_option(name: str, key: str, value: str) -> Any:
    """The value of an option that any method has. Raises UserError."""
    if key == "budget":
        if value != "similarity":
            raise UserError(f"option budget of {name} is {value!r}; it must be similarity")
        return value
    if key == "keep":
        number = _option_value(name, key, value, 1.0 if "." in value else 1)
        if not 0 < number < 1 and (number < 1 or "." in value):
            raise UserError(
                f"option keep of {name} is {value}; it must be a whole number, at least 1, or a"
                " share below 1"
            )
        return number
    reference = _option_value(name, key, value, REFERENCE)
    if not 0 < reference <= 2:
        raise UserError(f"option reference of {name} is {value}; it must be above 0, at most 2")
    return reference


def _reference(method: Method, options: dict[str, Any]) -> float | None:
    """The reference of budget=similarity, which is taken out of the options; None without it.

    Raises UserError where the method cannot keep a number of each image's own.
    """
    name, reference = method.name, options.pop("reference", None)
    if options.pop("budget", None) is None:
        if reference is not None:
            raise UserError(f"option reference of {name} goes with budget=similarity; add that")
        return None
    if method.stage not in (Stage.FEATURES, Stage.PROJECTED) or name == "none":
        raise UserError(
            f"{name} takes no budget=similarity: that is for methods which choose among the tokens"
            " that the tower gave, ahead of the language model"
        )
    if options.get("dynamic"):
        raise UserError(f"{name}:dynamic gives each image a budget already; leave budget out")
    return REFERENCE if reference is None else float(reference)


def unknown_pruner(name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is neither a method's nor a preset's."""
    command = program("mlx_vlm_prune.pruners")
    return UserError(f"no pruner is called {name!r}; {suggestion(name, known)} {command} lists all")


def _option_value(name: str, key: str, value: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[value.lower()]
        parsed = kind(value)
        if parsed != parsed or parsed in (float("inf"), -float("inf")):
            raise ValueError
        return parsed
    except (KeyError, ValueError):
        article = "an" if kind is int else "a"
        raise UserError(
            f"option {key} of {name} takes {article} {kind.__name__}, not {value!r}"
        ) from None
