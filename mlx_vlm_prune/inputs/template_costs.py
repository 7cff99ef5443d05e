"""What the parts of a chat template cost, in steps, told before they are run.

A step is an expression that is evaluated, or eight characters written. Costs are no less than what
is done.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from string import Formatter
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace

CALL = 20  # steps of a call, an operator or an output
PART = 8  # of looking at an item of a list
WRITTEN = 8  # characters a step
DEEPEST = 100  # lists in lists
TOO_MUCH = "it takes more steps, or writes more, than a prompt needs"


class TemplateLimitError(RuntimeError):
    """A template takes more time or memory than it may."""


class Meter:
    """The steps that one rendering has left."""

    def __init__(self, steps: int):
        self.left = steps

    def spend(self, steps: int) -> None:
        """Raises TemplateLimitError where no more are left."""
        self.left -= steps
        if self.left < 0:
            raise TemplateLimitError(TOO_MUCH)


METER: ContextVar[Meter] = ContextVar("METER")


def spend(steps: int) -> None:
    """Take steps from the rendering that runs. Raises TemplateLimitError."""
    METER.get().spend(steps)


def each(items: Any, cost: int = 1) -> Iterator[Any]:
    """The items, each of which costs steps."""
    meter = METER.get()
    for item in items:
        meter.spend(cost)
        yield item


def is_lazy(value: Any) -> bool:
    """Is this an iterator, whose items are not there yet?"""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


def held(value: Any) -> Any:
    """The value; of an iterator the list of its items, so that they can be weighed."""
    return list(each(value)) if is_lazy(value) else value


def weight(value: Any, most: int | None = None) -> int:
    """Steps that it takes to read a value through, however often its parts are shared.

    Raises TemplateLimitError where these are more than `most`, by default all that are left.
    """
    if isinstance(value, str | bytes):
        return PART + len(value) // WRITTEN
    most = METER.get().left if most is None else most
    total, rest = 0, [(value, 0)]
    while rest:
        part, depth = rest.pop()
        total += PART
        if isinstance(part, str | bytes):
            total += len(part) // WRITTEN
        elif isinstance(part, int):
            total += part.bit_length() // 64
        elif isinstance(part, range):
            total += len(part)
        elif parts := _parts(part):
            rest += [(inner, depth + 1) for inner in parts]
        if total > most or depth > DEEPEST:
            raise TemplateLimitError(TOO_MUCH)
    return total


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Namespace):  # it can hold itself
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    is_view = isinstance(value, type({}.keys()) | type({}.values()) | type({}.items()))
    return [*value] if is_view or isinstance(value, list | tuple | set | frozenset) else []


def weights(*values: Any) -> int:
    return sum(map(weight, values))


def written(characters: int) -> int:
    """Steps of writing that many characters."""
    return max(characters, 0) // WRITTEN


def operator_cost(operator: str, left: Any, right: Any) -> int:
    """Of an operator between two values."""
    if operator == "%" and isinstance(left, str):
        return CALL + percent_cost(left, right)
    for repeated, count in ((left, right), (right, left)):
        if operator == "*" and isinstance(repeated, str | list | tuple) and isinstance(count, int):
            unit = WRITTEN if isinstance(repeated, str) else 1
            return CALL + max(count, 0) * len(repeated) // unit
    if isinstance(left, str | list | tuple):
        unit = WRITTEN if isinstance(left, str) else 1
        return CALL + (len(left) + (len(right) if hasattr(right, "__len__") else 0)) // unit
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length()
        other = max(right, 0) * bits if operator == "**" else right.bit_length()
        return CALL + (bits + other) ** 2 // 4096
    return CALL


def percent_cost(text: str, values: Any) -> int:
    """Of `text % values`."""
    if re.search(r"%\([^)]*\(", text):
        raise TemplateLimitError("a key of a % format has brackets")
    pairs = re.findall(r"%(?:\([^)]*\))?[-+ #0]*(\d+|\*)?(?:\.(\d+|\*))?", text)
    widths = [width for pair in pairs for width in pair if width]
    if "*" in widths:
        listed = values if isinstance(values, tuple) else (values,)
        widths += [str(abs(n)) for n in listed if isinstance(n, int) and n.bit_length() < 64]
    widest = max((_number(width) for width in widths if width != "*"), default=0)
    return len(text) + text.count("%") * (written(widest) + weight(values))


def _number(digits: str) -> int:
    return int(digits.lstrip("0")[:10] or 0)


def format_cost(text: str, values: Sequence[Any]) -> int:
    """Of `text.format(*values)`."""
    fields = [spec for _, name, spec, _ in Formatter().parse(text) if name is not None]
    if any("{" in spec for spec in fields if spec):
        raise TemplateLimitError("a format stands inside a format")
    widest = max((_number(n) for spec in fields for n in re.findall(r"\d+", spec or "")), default=0)
    return len(text) + len(fields) * (written(widest) + weights(*values))


def replace_cost(text: str, old: Any, new: Any) -> int:
    """Of writing `new` in place of each `old`."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return 0
    return written((text.count(old) if old else len(text) + 1) * len(new))


def strip_cost(text: str, characters: Any) -> int:
    return len(text) * len(characters) // 64 if isinstance(characters, str) else 0


def width_cost(width: Any, lines: int = 1) -> int:
    """Of padding lines to a width, a number of characters or a text."""
    size = len(width) if isinstance(width, str) else width if isinstance(width, int) else 0
    return written(size * lines)


def method_cost(text: str, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Of a method of a text."""
    first, second = [*args, None, None][:2]
    cost = CALL + written(len(text)) + weights(*args)
    if name in ("center", "ljust", "rjust", "zfill"):
        return cost + width_cost(first)
    if name in ("split", "rsplit", "splitlines"):
        return cost + 2 * len(text)
    if name in ("strip", "lstrip", "rstrip"):
        return cost + strip_cost(text, first)
    if name == "replace":
        return cost + replace_cost(text, first, second)
    if name == "join" and hasattr(first, "__len__"):
        return cost + written(len(text) * len(first))
    if name == "format":
        return cost + format_cost(text, (*args, *kwargs.values()))
    return cost + (format_cost(text, args) if name == "format_map" else 0)
