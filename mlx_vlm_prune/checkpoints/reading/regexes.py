"""Which regular expressions surely take little time: those that backtrack over one repeat at most.

The expressions of published tokenizers are such. What is not understood here is not harmless.
"""

import re
from dataclasses import dataclass

LONGEST, DEEPEST = 5000, 8  # characters; groups in groups
MOST_WAYS = 64  # in which bounded repeats can be tried before the last part that must match
LARGEST_REPEAT = 64  # a larger one counts as unbounded
EXPANDED = 1000  # the engine writes repeats out, which takes memory
GROUP = re.compile(r"\((?:\?(?:(?P<look><?[=!])|(?P<flags>[im]*)(?P<end>[:)])|>))?")
CHARACTER = re.compile(
    r"\\(?:[pP]\{\^?\w+\}|x\{\w+\}|x\w\w|u\w{4}|[sSdDwWhHrntfvae]|[^\w\s])|[^\\]"
)
EDGE = re.compile(r"[\^$]|\\[bBAzZG]")  # of no width
REPEAT = re.compile(r"(?:([?*+])|\{(\d*)(,?)(\d*)\})[?+]?")


class NotUnderstood(Exception):
    """An expression has a part that may take long."""


@dataclass(frozen=True)
class Part:
    """A part of an expression, such as a character, a group or a branch."""

    must: bool  # can it not be left out?
    empty: bool  # can it match nothing?
    ways: int  # in which it is tried at one place, unbounded repeats counted as one
    unbounded: bool  # is there a repeat without a bound in it?
    fixed: bool = True  # does it always match as many characters?
    size: int = 1  # characters of the expression, repeats written out


@dataclass(frozen=True)
class Expression:
    """What is known of a regular expression."""

    harmless: bool
    empty: bool  # can it match between two characters?


def read_expression(text: str) -> Expression:
    """Whether an expression of Oniguruma's takes little time on any text."""
    try:
        if len(text) > LONGEST:
            raise NotUnderstood
        part, end = _alternatives(text, 0, 0)
        if end != len(text):
            raise NotUnderstood
    except NotUnderstood:
        return Expression(False, True)
    return Expression(True, part.empty)


def _alternatives(text: str, start: int, depth: int) -> tuple[Part, int]:
    """The branches from `start` on, as one part, and where they end."""
    if depth > DEEPEST:
        raise NotUnderstood
    branches: list[Part] = []
    items: list[Part] = []
    at = start
    while at < len(text) and text[at] != ")":
        if text[at] == "|":
            branches.append(_branch(items))
            items, at = [], at + 1
            continue
        part, at = _repeated(text, at, depth)
        items.append(part)
    branches.append(_branch(items))
    return Part(
        must=True,
        empty=any(branch.empty for branch in branches),
        ways=sum(branch.ways for branch in branches),
        unbounded=any(branch.unbounded for branch in branches),
        fixed=len(branches) == 1 and branches[0].fixed,
        size=sum(branch.size for branch in branches),
    ), at


def _branch(items: list[Part]) -> Part:
    """Parts one after another. What comes before the last one that must match is tried again where
    that one fails."""
    last = max((i for i, item in enumerate(items) if item.must), default=0)
    ways = 1
    for item in items[:last]:
        ways *= item.ways
    if ways > MOST_WAYS or sum(item.unbounded for item in items[:last]) > 1:
        raise NotUnderstood
    return Part(
        must=True,
        empty=all(item.empty for item in items),
        ways=ways * max((item.ways for item in items[last:]), default=1),
        unbounded=any(item.unbounded for item in items),
        fixed=all(item.fixed for item in items),
        size=sum(item.size for item in items),
    )


def _repeated(text: str, start: int, depth: int) -> tuple[Part, int]:
    """One part with its repeat."""
    part, at = _one(text, start, depth)
    repeat = REPEAT.match(text, at)
    if repeat is None or repeat[0] in ("{}", "{,}"):
        return part, at
    sign, least, comma, most = repeat.groups()
    fewest = {"?": 0, "*": 0, "+": 1}.get(sign, int((least or "0")[:6]) if not sign else 0)
    largest: int | None = 1 if sign == "?" else None
    if not sign and (most or not comma):
        largest = int((most if comma else least)[:6])
    is_plain = part.fixed and not part.empty
    size = part.size * max(largest or fewest, 1)
    if size > EXPANDED or (largest != 1 and not is_plain):
        raise NotUnderstood  # what is repeated may match in many ways
    is_open = largest is None or largest > LARGEST_REPEAT
    ways = 1 if is_open or largest is None else max(largest - fewest + 1, 1) * part.ways
    return Part(
        must=part.must and fewest > 0,
        empty=part.empty or fewest == 0,
        ways=ways,
        unbounded=part.unbounded or is_open,
        fixed=part.fixed and fewest == largest,
        size=size,
    ), repeat.end()


def _one(text: str, start: int, depth: int) -> tuple[Part, int]:
    """A character, a class or a group."""
    if edge := EDGE.match(text, start):
        return Part(True, True, 1, False), edge.end()
    if text[start] == "[":
        return Part(True, False, 1, False), _class_end(text, start)
    if text[start] == "(":
        return _group(text, start, depth)
    character = CHARACTER.match(text, start)
    if character is None or text[start] in "*+?":
        raise NotUnderstood
    return Part(True, False, 1, False), character.end()


def _group(text: str, start: int, depth: int) -> tuple[Part, int]:
    opening = GROUP.match(text, start)
    if opening is None or (opening[0] == "(" and text[start + 1 : start + 2] == "?"):
        raise NotUnderstood
    if opening["end"] == ")":  # flags for what follows
        return Part(False, True, 1, False), opening.end()
    part, at = _alternatives(text, opening.end(), depth + 1)
    if text[at : at + 1] != ")":
        raise NotUnderstood
    # One look ahead or back is not tried in several ways.
    return Part(True, True, 1, False) if opening["look"] else part, at + 1


def _class_end(text: str, start: int) -> int:
    """Where a class of characters ends; one may stand in another."""
    depth, at = 0, start
    while at < len(text):
        if text[at] == "\\":
            at += 1
        elif text[at] == "[":
            depth += 1
        elif text[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    raise NotUnderstood
