"""What methods inside a tower leave and merge, as loops over its tokens, in NumPy.

Shapes: N visual tokens of g patches each, D features, H heads, d head size, a angles.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Token:
    """A visual token inside the tower, or CLS, whose place is -1."""

    place: int
    rows: np.ndarray  # (g, D)
    patches: np.ndarray | None = None  # embeddings without positions
    angles: np.ndarray | None = None  # of rotation, (g, a)
    window: int = 0
    size: float = 1.0
    score: float | None = None  # FlowCut's, of the layers so far
    deep: list[np.ndarray] = field(default_factory=list)  # what DeepStack adds


@dataclass
class Read:
    """By a token's identity: what it reads (g, D), the norm of its queries and of its keys, its
    keys as one vector, its values by head (H, d), the attention that it gets, and that from CLS;
    and CLS's values, or the mean patch's."""

    y: dict[int, np.ndarray] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    keys: dict[int, np.ndarray] = field(default_factory=dict)
    received: dict[int, float] = field(default_factory=dict)
    from_cls: dict[int, float] = field(default_factory=dict)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    cls_value: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


def in_raster_order(tokens: list[Token]) -> list[Token]:
    return sorted(tokens, key=lambda token: token.place)


def highest(scores: list[float], order: list[Token], K: int) -> list[Token]:
    ranked = sorted(range(len(order)), key=lambda i: (-scores[i], order[i].place))[:K]
    return [order[i] for i in sorted(ranked)]


def recycled(scores: list[float], order: list[Token], K: int) -> list[Token]:
    """iLLaVA's: the last of the kept, one of so few, takes in the five likest that leave."""
    ranked = [order[i] for i in sorted(range(len(order)), key=lambda i: (-scores[i], i))]
    kept, leaving = ranked[:K], ranked[K:]
    product = [float((kept[-1].rows * token.rows).sum()) for token in leaving]
    likest = sorted(range(len(leaving)), key=lambda i: -product[i])[:5]
    weights = np.exp(np.array([product[i] for i in likest]) / np.sqrt(kept[-1].rows.size))
    mixture = sum(w * leaving[i].rows for w, i in zip(weights, likest, strict=True)) / weights.sum()
    kept[-1].rows = (kept[-1].rows + mixture) / 2
    return kept


def flowing(order: list[Token], read: "Read", K: int, remaining: int) -> list[Token]:
    """FlowCut's, with so many layers till its last one."""
    from_cls = read.from_cls or read.received
    flow = np.array([from_cls[id(token)] for token in order])
    flow /= flow.sum()
    alike = np.zeros(len(order))
    heads, itself = len(read.cls_value), bool(read.from_cls)
    for h in range(heads):
        products = [float(read.values[id(token)][h] @ read.cls_value[h]) for token in order]
        products += [float(read.cls_value[h] @ read.cls_value[h])] * itself
        powers = np.exp(np.array(products) - max(products))
        alike += (powers / powers.sum())[: len(order)] / heads
    alike /= alike.sum()
    for token, part in zip(order, flow + alike, strict=True):
        score = part * np.abs(read.values[id(token)].mean(axis=0)).sum()
        token.score = score if token.score is None else (token.score + score) / 2
    n, left = len(order), K
    if remaining % 2:
        return order
    if remaining:
        entropy = -float((flow * np.log(flow)).sum()) / np.log(n)
        left = n - min(round((n - K) / remaining**0.5 * (1 - entropy**2)), n - K)
    return highest([token.score for token in order], order, left)


def merged_in_windows(order: list[Token], grid: tuple[int, int], K: int) -> list[Token]:
    """MustDrop's: in the windows whose tokens are most alike the first ones become one, which
    stands where their middle one did."""
    side, (rows, columns) = 3, grid
    while -(-rows // side) * -(-columns // side) > K:
        side += 1
    members: dict[tuple[int, int], list[Token]] = {}
    for token in in_raster_order(order):
        row, column = divmod(token.place, columns)
        members.setdefault((row // side, column // side), []).append(token)
    windows = [members[key] for key in sorted(members)]

    def likeness(window: list[Token]) -> float:
        units = [t.rows.reshape(-1) / np.linalg.norm(t.rows) for t in window]
        pairs = [a @ b for j, a in enumerate(units) for k, b in enumerate(units) if j != k]
        return round(float(np.mean(pairs)), 9) if pairs else -1.0

    leaving, kept = len(order) - K, list[Token]()
    for window in sorted(windows, key=lambda window: -likeness(window)):
        m = min(len(window) - 1, leaving)
        leaving -= m
        joined, middle = window[: m + 1], window[(m + 1) // 2]
        deep = zip(*(token.deep for token in joined), strict=True)
        middle.deep = [np.mean(each, axis=0) for each in deep]
        middle.rows = np.mean([token.rows for token in joined], axis=0)
        kept += [middle, *window[m + 1 :]]
    return in_raster_order(kept)


def merged(order: list[Token], key: dict[int, np.ndarray], r: int, has_cls: bool) -> list[Token]:
    """One round of ToMe: the r most similar of every second token merge into others."""
    ones, others = order[int(has_cls) :: 2], order[int(not has_cls) :: 2]
    best = []
    for token in ones:
        a = key[id(token)] / np.linalg.norm(key[id(token)])
        similar = [a @ key[id(o)] / np.linalg.norm(key[id(o)]) for o in others]
        best.append((max(similar), int(np.argmax(similar))))
    likest = sorted(range(len(ones)), key=lambda i: -best[i][0])
    leaving, rest = likest[:r], likest[r:]
    for j, home in enumerate(others):
        members = [home, *(ones[i] for i in leaving if best[i][1] == j)]
        sizes = np.array([member.size for member in members])
        mean = sizes / sizes.sum()
        home.rows = sum(w * member.rows for w, member in zip(mean, members, strict=True))
        deep = zip(*(member.deep for member in members), strict=True)
        home.deep = [sum(w * x for w, x in zip(mean, each, strict=True)) for each in deep]
        home.size = float(sizes.sum())
    return [ones[i] for i in (sorted(rest) if has_cls else rest)] + others
