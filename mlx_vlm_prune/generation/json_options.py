"""Options whose value is a JSON object, such as --host-options."""

import argparse
from typing import Any

from ..checkpoints.reading.files import parse_json


class MergeOptions(argparse.Action):
    """Adds a JSON object, or its constant, to what was given before."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        given = self.const if self.nargs == 0 else values
        setattr(namespace, self.dest, {**(getattr(namespace, self.dest) or {}), **given})


def json_object(text: str) -> dict[str, Any]:
    shown = repr(text) if len(text) <= 80 else f"{text[:40]!r}…"
    try:
        value = parse_json(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{shown} is no JSON object: it {problem}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{shown} is no JSON object")
    return value
