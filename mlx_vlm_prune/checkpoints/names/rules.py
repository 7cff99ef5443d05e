"""Rules between published tensor names and ours. The way back is derived from the same rules.

`*` is the number of a layer or an expert.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from .value_order import Reordering


@dataclass(frozen=True)
class Rule:
    """A published name and ours; `reordering`, if the values lie in another order."""

    published: str
    ours: str
    reordering: Reordering | None = None


Table = tuple[Rule, ...]


def same_names(published: str, ours: str, names: str) -> list[Rule]:
    """Rules for names that differ only in what stands before them."""
    return [Rule(f"{published}.{name}", f"{ours}.{name}") for name in names.split()]


def weights_and_biases(names: str) -> str:
    """Each name with a weight and a bias."""
    return " ".join(f"{name}.weight {name}.bias" for name in names.split())


def to_ours(table: Table, name: str) -> tuple[str, Rule] | None:
    """Our name of a published tensor, and its rule; None where the table has none."""
    return _rename(_patterns(table, from_ours=False), name)


def to_published(table: Table, name: str) -> tuple[str, Rule] | None:
    """The published name of one of our tensors, and its rule."""
    return _rename(_patterns(table, from_ours=True), name)


def published_order(table: Table, names: Iterable[str]) -> list[str]:
    """Published names in the order of the model that they were published from."""
    first: dict[str, int] = {}  # a name's beginning up to a star: the first rule that has it
    for i, rule in enumerate(table):
        for star in re.finditer(r"\*", rule.published):
            first.setdefault(rule.published[: star.start()], i)
        first.setdefault(rule.published, i)

    def key(name: str) -> list[int]:
        match = to_ours(table, name)
        assert match, name
        pattern, order = match[1].published, []
        stars = [star.start() for star in re.finditer(r"\*", pattern)]
        for at, number in zip(stars, _numbers_at_stars(pattern, name), strict=True):
            order += [first[pattern[:at]], number]
        return [*order, first[pattern]]

    return sorted(names, key=key)


def _numbers_at_stars(pattern: str, name: str) -> list[int]:
    match = _compiled(pattern).fullmatch(name)
    assert match, (pattern, name)
    return [int(number) for number in match.groups()]


def _rename(patterns: Sequence[tuple[re.Pattern[str], str, Rule]], name: str):
    for pattern, template, rule in patterns:
        if match := pattern.fullmatch(name):
            for number in match.groups():
                template = template.replace("*", number, 1)
            return template, rule
    return None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(0|[1-9][0-9]{0,5})"))


@cache
def _patterns(table: Table, from_ours: bool) -> list[tuple[re.Pattern[str], str, Rule]]:
    if from_ours:
        return [(_compiled(rule.ours), rule.published, rule) for rule in table]
    return [(_compiled(rule.published), rule.ours, rule) for rule in table]
