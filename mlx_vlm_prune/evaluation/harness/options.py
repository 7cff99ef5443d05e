"""What lmms-eval says of a run (`--model_args`) and of an answer (`generation_kwargs`), checked."""

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from ...checkpoints.errors import UserError, short
from ...generation.request import is_whole
from ...inputs.budget import check_budget
from ...inputs.image import check_max_pixels
from ...pruners import AUTO
from ...pruners.contract import Policy

logger = logging.getLogger("mlx_vlm_prune")
PASSED_ON = ("top_p", "top_k", "min_p", "repetition_penalty")
READ = ("max_new_tokens", "temperature", "do_sample", "num_beams", "until", "seed", *PASSED_ON)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


Kind = tuple[Callable[[Any], bool], str]  # is a value one? and what a sentence calls it
COUNT: Kind = (lambda value: is_whole(value) and value >= 1, "a whole number, at least 1")
SEED: Kind = (lambda value: is_whole(value) and 0 <= value < 2**63, "a whole number, 0 or more")
NUMBER: Kind = (_is_number, "a number")
KINDS_OF_RUN: Mapping[str, Kind] = {
    "max_new_tokens": COUNT,
    "batch_size": COUNT,
    "seed": SEED,
    "enable_thinking": (lambda value: isinstance(value, bool | None), "true or false"),
    "cache_gb": (lambda n: _is_number(n) and 0 <= n < float("inf"), "a number, 0 or more"),
}
KINDS_OF_ANSWER: Mapping[str, Kind] = {
    "max_new_tokens": COUNT,
    "num_beams": COUNT,
    "seed": SEED,
    "do_sample": (lambda value: isinstance(value, bool), "true or false"),
    "top_k": (is_whole, "a whole number"),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), NUMBER),
}
ABOUT_OTHERS = ("device", "max_batch_size")  # lmms-eval gives these to all models


@dataclass(frozen=True)
class RunOptions:
    """`--model_args`, by `generate`'s names, and `--batch_size`. Raises UserError.

    `max_new_tokens` holds where a task says nothing; `cache_gb` bounds what is kept of earlier
    prompts, of which the next may be another question about the same picture.
    """

    model: str | None = None
    pruner: str | None = None
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    positions: Policy | None = None
    dtype: str = "auto"
    revision: str | None = None
    adapter_path: str | None = None
    max_pixels: int | None = None
    max_new_tokens: int = 1024
    system: str | None = None
    enable_thinking: bool | None = None
    seed: int = 0
    batch_size: int = 1
    cache_gb: float = 1.0

    def __post_init__(self) -> None:
        check_budget(self.keep_ratio, self.keep_tokens)
        if self.max_pixels is not None:
            check_max_pixels(self.max_pixels)
        _check_kinds(vars(self), KINDS_OF_RUN)

    @property
    def is_auto(self) -> bool:
        """Is a method to be chosen: by name, or since there is a budget and no method?"""
        has_budget = self.keep_ratio is not None or self.keep_tokens is not None
        return self.pruner == AUTO or (self.pruner is None and has_budget)

    @property
    def request(self) -> dict[str, Any]:
        """The arguments that are the same in every request."""
        names = ("pruner", "keep_ratio", "keep_tokens", "positions", "max_pixels")
        thinking = {"enable_thinking": self.enable_thinking}
        template = None if self.enable_thinking is None else {"chat_template_config": thinking}
        return {name: getattr(self, name) for name in names} | (template or {})


def _check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Raises UserError for a value of another kind: lmms-eval hands on any text."""
    for name, (is_of_kind, kind) in kinds.items():
        if name in values and not is_of_kind(values[name]):
            raise UserError(f"{name} is {short(values[name])}; it must be {kind}")


def read_run_options(arguments: Mapping[str, Any]) -> RunOptions:
    """`--model_args` as lmms-eval has parsed them. Raises UserError for names that are not here."""
    known = [field.name for field in fields(RunOptions)]
    given = {name: value for name, value in arguments.items() if name not in ABOUT_OTHERS}
    for name in given:
        if name not in known:
            raise UserError(f"model_args has no {name}; there are {', '.join(known)}")
    for name, value in given.items():
        given[name] = _as_meant(name, value)
    return RunOptions(**given)


def _as_meant(name: str, value: Any) -> Any:
    """lmms-eval reads 7 as a number where a folder is called 7, and keeps the quotes of a text with
    commas in it; `--batch_size` comes as a text."""
    if name == "batch_size" and isinstance(value, str) and value.isdecimal():
        return int(value)
    if name in ("model", "pruner", "revision", "adapter_path", "system", "dtype"):
        text = None if value is None else str(value)
        is_quoted = text is not None and len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if text and is_quoted else text
    return value


@dataclass(frozen=True)
class Decoding:
    """How an answer is written: `Request`'s arguments, and the texts at which it ends."""

    request: dict[str, Any]
    until: tuple[str, ...]


def read_generation_kwargs(kwargs: Mapping[str, Any], options: RunOptions, turn: int) -> Decoding:
    """A task's `generation_kwargs`, and `--gen_kwargs`, for the answer number `turn` (from 0) to a
    question that is asked several times: each draws by a seed of its own.

    As in transformers, nothing is drawn where `do_sample` is false or the temperature is 0; without
    a temperature it is 1 where `do_sample` is true, else 0. What else a task says is not followed,
    and a warning says so once. Raises UserError for beam search and for values that cannot be.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    _check_kinds(given, KINDS_OF_ANSWER)
    if (beams := given.get("num_beams", 1)) != 1:
        raise UserError(
            f"num_beams is {short(beams)}, and there is no beam search here; num_beams=1 in"
            " gen_kwargs leaves it out"
        )
    for name in sorted(given.keys() - set(READ)):
        _warn_of_option(name)
    temperature = given.get("temperature", 1.0 if given.get("do_sample") else 0.0)
    request = {
        "max_tokens": given.get("max_new_tokens", options.max_new_tokens),
        "temperature": 0.0 if given.get("do_sample") is False else temperature,
    }
    if request["temperature"]:
        request |= {name: given[name] for name in PASSED_ON if name in given}
        request["seed"] = given.get("seed", options.seed) + turn
    elif "repetition_penalty" in given:
        request["repetition_penalty"] = given["repetition_penalty"]
    return Decoding(request, _ends(given.get("until", ())))


def _ends(until: Any) -> tuple[str, ...]:
    """The texts at which an answer ends. Raises UserError."""
    listed = [until] if isinstance(until, str) else until
    is_list = isinstance(listed, list | tuple)
    if not is_list or not all(isinstance(end, str | None) for end in listed):
        raise UserError(f"until is {short(until)}; it must be a text or a list of texts")
    return tuple(end for end in listed if end)


@functools.cache
def _warn_of_option(name: str) -> None:
    """Once for each name."""
    logger.warning("the task's generation_kwargs say %s, which is not followed here", name)
