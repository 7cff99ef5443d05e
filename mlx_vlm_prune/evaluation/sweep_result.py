"""The figures of a sweep: from its rounds to a row for full and for each case."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from ..checkpoints.errors import UserError
from ..machine.timing import Gain, spread
from .budgeted_methods import BudgetedMethod
from .sweep_cases import SweptModel
from .sweep_run import Measurement, SweepRun

PARTS = ("image", "vision", "pruner", "prefill", "first_token", "total")


@dataclass(frozen=True)
class Pair:
    """An answer about an image, and the full answer before it; the same one twice for full."""

    image: int
    pruned: Measurement
    full: Measurement


def sweep_rows(run: SweepRun, model: SweptModel) -> list[dict[str, Any]]:
    """A row for full and for every case that could be measured.

    Raises UserError where no image could be asked about.
    """
    full = [Pair(line.image, one, one) for line in run.rounds for one in line.full]
    if not full:
        raise UserError(next(iter(run.skipped.values())))
    rows = [_row(run, model, run.full, full)]
    for p, case in enumerate(run.cases):
        pairs = [
            Pair(line.image, one.measurement, line.full[one.before])
            for line in run.rounds
            for one in line.pruned
            if one.case == p
        ]
        if pairs:
            rows.append(_row(run, model, case, pairs))
    return rows


def _row(
    run: SweepRun, model: SweptModel, case: BudgetedMethod, pairs: Sequence[Pair]
) -> dict[str, Any]:
    by_image: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_image.setdefault(pair.image, []).append(pair)
    first = [of_image[0] for of_image in by_image.values()]
    row = case.columns([pair.full.visual_tokens for pair in first])
    row |= {
        "kept": fmean(pair.pruned.kept for pair in first),
        "images": len(first),
        "runs": len(pairs),
        "ms": _spreads(pairs),
        "tokens_per_second": _spread_of([pair.pruned.tokens_per_second for pair in pairs]),
        "generation_tokens": fmean(len(pair.pruned.token_ids) for pair in first),
        "prompt_tokens": fmean(pair.pruned.prompt_tokens for pair in first),
        "cache_bytes": fmean(pair.pruned.cache_bytes for pair in first),
        "cache_saved": _saved([(p.full.cache_bytes, p.pruned.cache_bytes) for p in first]),
        "peak_gb": max(pair.pruned.peak_gb for pair in pairs),
    }
    row |= _operations(run, model, case, first)
    if case is not run.full:
        row["gain"] = {"first_token": _gain(pairs, row), "total": _plain_gain(pairs)}
    agreements = [pair.pruned.agreement(pair.full) for pair in pairs]
    row["agreement"] = {name: fmean(a[name] for a in agreements) for name in agreements[0]}
    names = [*run.images]
    row["answers"] = [_answer(names[image], of_image) for image, of_image in by_image.items()]
    return row


def _spreads(pairs: Sequence[Pair]) -> dict[str, dict[str, float] | None]:
    """Median and deciles of each part's milliseconds; None of a part that was not timed alone."""
    return {part: _spread_of([pair.pruned.ms[part] for pair in pairs]) for part in PARTS}


def _spread_of(values: Sequence[float | None]) -> dict[str, float] | None:
    present = [value for value in values if value is not None]
    return spread(present) if present else None


def _operations(
    run: SweepRun, model: SweptModel, case: BudgetedMethod, first: Sequence[Pair]
) -> dict[str, Any]:
    """The mean multiply-adds of an answer by part, and the share saved up to the first token."""
    counts = [model.operations(case, pair.full, pair.pruned) for pair in first]
    full = [model.operations(run.full, pair.full, pair.full) for pair in first]
    present = [count for count in counts if count]
    if not present:
        return {"operations": None, "operations_saved": None}
    pairs = [(a["first_token"], b["first_token"]) for a, b in zip(full, counts, strict=True)
             if a and b]  # fmt: skip
    means = {part: fmean(count[part] for count in present) for part in present[0]}
    return {"operations": means, "operations_saved": _saved(pairs)}


def _saved(pairs: Sequence[tuple[int, int]]) -> float:
    """The share that the second of each pair has less, over all."""
    full, pruned = (sum(values) for values in zip(*pairs, strict=True))
    return 1 - pruned / full if full else 0.0


def _gain(pairs: Sequence[Pair], row: Mapping[str, Any]) -> dict[str, Any]:
    """The gain to the first token; predicted where the operations of all parts are counted."""
    is_whole = row["operations"] and "vision" in row["operations"]
    predicted = 1 / (1 - row["operations_saved"]) if is_whole else None
    return _gain_of("first_token", pairs).report(predicted)


def _plain_gain(pairs: Sequence[Pair]) -> dict[str, Any]:
    """The gain of the whole answer, which may be longer or shorter than full's."""
    gain = _gain_of("total", pairs)
    return {"realised": gain.reported, "p10": gain.p10, "p90": gain.p90}


def _gain_of(part: str, pairs: Sequence[Pair]) -> Gain:
    full, pruned = ([one.ms[part] or 0.0 for one in ones] for ones in
                    ([p.full for p in pairs], [p.pruned for p in pairs]))  # fmt: skip
    return Gain.of(full, pruned)


def _answer(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    """The answer about one image; the text of its first round."""
    first = pairs[0]
    return {
        "image": name,
        "text": first.pruned.text,
        "generation_tokens": len(first.pruned.token_ids),
        "visual_tokens": first.pruned.visual_tokens,
        "kept": first.pruned.kept,
        **first.pruned.agreement(first.full),
        "first_token_ms": median(pair.pruned.ms["first_token"] or 0.0 for pair in pairs),
        "total_ms": median(pair.pruned.ms["total"] or 0.0 for pair in pairs),
    }


def refusals(run: SweepRun) -> list[dict[str, Any]]:
    """The cases that failed on an image, and why; where all images have one reason, once."""
    answered = [i for i in range(len(run.images)) if i not in run.skipped]
    names, rows = [*run.images], []
    for p, case in enumerate(run.cases):
        reasons = {i: run.failures[i, p] for i in answered if (i, p) in run.failures}
        row = {"pruner": case.spec, "tokens": case.K}
        if len(reasons) == len(answered) and len({*reasons.values()}) == 1:
            rows.append({**row, "why": reasons[answered[0]]})
        else:
            rows += [{**row, "image": names[i], "why": why} for i, why in reasons.items()]
    return rows
