"""The fields of an untrusted JSON object, each checked as it is read."""

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

LARGEST = 1 << 20  # of any size in a config.json
MOST_LAYERS = 512  # or experts


class Fields:
    """One object of a file; `part` is its name where it lies inside another.

    A field that is missing or of the wrong kind raises a UserError that names file and field.
    """

    def __init__(self, values: Mapping[str, Any], file: Path, part: str = ""):
        self.values, self.file, self.name = values, file, part

    def get(self, field: str) -> Any:
        return self.values.get(field)

    def error(self, field: str, allowed: str) -> UserError:
        """The error of a field that is not what is allowed."""
        place = f"{self.name}.{field}" if self.name else field
        if field not in self.values:
            return UserError(f"{self.file} has no {place}")
        return UserError(f"{self.file}: {place} is {reprlib.repr(self.get(field))}, not {allowed}")

    def part(self, field: str) -> "Fields":
        """An object inside this one."""
        if not isinstance(self.get(field), Mapping):
            raise self.error(field, "an object")
        return Fields(self.values[field], self.file, field)

    def whole_number(self, field: str) -> int:
        """A size, at least 1."""
        most = MOST_LAYERS if "layers" in field or "experts" in field else LARGEST
        value = self.get(field)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(field, f"a whole number from 1 to {most}")
        return value

    def positive(self, field: str, default: float | None = None) -> float:
        """A number above zero."""
        value = self.values.get(field, default)
        if not is_positive(value):
            raise self.error(field, "a positive number")
        return float(value)

    def flag(self, field: str, default: bool | None = None) -> bool:
        """True or false; without a default it must be there."""
        value = self.values.get(field, default)
        if not isinstance(value, bool):
            raise self.error(field, "true or false")
        return value


def is_positive(value: Any) -> bool:
    """Is this a number above zero and below 1e12?"""
    return type(value) in (int, float) and 0 < value < 1e12
