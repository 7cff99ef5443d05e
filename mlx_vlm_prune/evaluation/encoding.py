"""Images through a CLIP or SigLIP by several methods in turns: times, embeddings and scores.

Shapes: I images, B of a batch, D numbers of an embedding, T texts, C cases.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..inputs.budget import tokens_for
from ..models.dual_encoder import DualEncoder
from ..pruners import Pipeline, plan
from .bootstrap import interval, resampled

COMPARED_AT_ONCE = 4096  # images, with all texts


@dataclass
class Case:
    """A method with its budget, and what came of it; the first case keeps all tokens."""

    spec: str
    pipeline: Pipeline
    K: int  # the budget
    tokens: int  # what is kept, which of a smaller image is less
    N: int
    keep_ratio: float | None = None
    batch_ms: list[float] = field(default_factory=list)  # of one image, a mean over its batch
    parts: list[np.ndarray] = field(default_factory=list)

    @property
    def features_ID(self) -> np.ndarray:
        """The embeddings, not normalised, float32."""
        return np.concatenate(self.parts)

    @property
    def key(self) -> str:
        """Its name in a file of features."""
        return "full" if self.spec == "none" else f"{self.spec}@{self.tokens}"

    @property
    def images(self) -> int:
        """Images encoded so far."""
        return sum(map(len, self.parts))


def cases_of(
    model: DualEncoder, specs: Sequence[str], budgets: Sequence[float]
) -> tuple[list[Case], list[dict[str, Any]]]:
    """Full, then every method at every budget, and those refused, with the reason.

    A budget is a number of tokens (int) or a share (float). Raises UserError for an unknown method,
    and where every one is refused.
    """
    N, cases = model.N, [Case("none", plan("none"), model.N, model.N, model.N)]
    refused: list[dict[str, Any]] = []
    ratio_of: dict[int, float | None] = {}
    for budget in budgets:
        K = tokens_for(N, budget) if isinstance(budget, float) else min(N, budget)
        ratio_of.setdefault(K, budget if isinstance(budget, float) else None)
    for spec in dict.fromkeys(specs):
        pipeline = plan(spec)
        for K, ratio in ratio_of.items() if spec != "none" else ():
            try:
                model.check(pipeline)
                grids, _ = model.plan_tower(pipeline.budgets(N, K))
                pipeline.signal_layers(model.config.vision.depth)
                tokens = min([K, *map(math.prod, grids)])
                if (spec, tokens) not in [(case.spec, case.tokens) for case in cases]:
                    cases.append(Case(spec, pipeline, K, tokens, N, ratio))
            except UserError as e:
                refused.append({"pruner": spec, "tokens": K, "why": str(e)})
    if refused and len(cases) == 1:
        raise UserError(refused[0]["why"])
    return cases, refused


def encode_batches(
    model: DualEncoder, cases: Sequence[Case], batches: Iterator[np.ndarray], runs: int
) -> Iterator[int]:
    """Encode batches of pixels (B, H, W, 3) by all cases; yields the images of each turn of a case.

    Every case encodes a batch `runs` times, and each time another one begins. The first batch goes
    through all cases once before. A batch of another size than the first is not timed.
    """
    first_size = turn = 0
    for pixels in batches:
        pixels_BHW3 = mx.array(pixels).astype(model.dtype)
        mx.eval(pixels_BHW3)
        if not turn:
            first_size = len(pixels)
            for case in cases:
                mx.eval(model.encode_images(pixels_BHW3, case.pipeline, case.K))
                yield first_size
        for run in range(runs):
            for case in (*cases[turn % len(cases) :], *cases[: turn % len(cases)]):
                start = time.perf_counter()
                x_BD = model.encode_images(pixels_BHW3, case.pipeline, case.K)
                mx.eval(x_BD)
                ms = 1000 * (time.perf_counter() - start) / len(pixels)
                if len(pixels) == first_size:
                    case.batch_ms.append(ms)
                if not run:
                    case.parts.append(np.array(x_BD.astype(mx.float32)))
                yield len(pixels)
            turn += 1


def cosines(a_ID: np.ndarray, b_ID: np.ndarray) -> np.ndarray:
    """The cosine of each pair of rows, (I,) float64; of equal rows exactly 1."""
    a_ID, b_ID = a_ID.astype(np.float64), b_ID.astype(np.float64)
    squares = ((x_ID * x_ID).sum(axis=1) for x_ID in (a_ID, b_ID))
    return (a_ID * b_ID).sum(axis=1) / np.sqrt(np.multiply(*squares))


def best_texts(image_ID: np.ndarray, text_TD: np.ndarray) -> np.ndarray:
    """The number of the text whose cosine with each image is highest, (I,); the lower of equals."""
    b_TD = text_TD.astype(np.float64)
    b_DT = (b_TD / np.linalg.norm(b_TD, axis=1, keepdims=True)).T
    starts = range(0, len(image_ID), COMPARED_AT_ONCE)
    parts = (image_ID[i : i + COMPARED_AT_ONCE].astype(np.float64) @ b_DT for i in starts)
    return np.concatenate([cosine_IT.argmax(axis=1) for cosine_IT in parts])


def rows(
    cases: Sequence[Case], text_TD: np.ndarray | None, right_I: Sequence[int | None], seed: int = 0
) -> list[dict[str, Any]]:
    """The figures of each case. `right_I`: the number of each image's text, or None."""
    full_ID = cases[0].features_ID
    table = []
    for case in cases:
        ms = float(np.median(case.batch_ms))
        low, high = np.quantile(case.batch_ms, (0.25, 0.75))
        cosine_I = cosines(full_ID, case.features_ID)
        row = {
            "pruner": case.spec,
            "tokens": case.tokens,
            "of": case.N,
            **({"keep_ratio": case.keep_ratio} if case.keep_ratio else {}),
            "ms": ms,
            "ms_spread": float(high - low) / 2 if len(case.batch_ms) > 1 else None,
            "images_per_second": 1000 / ms,
            "speed_up": float(np.median(cases[0].batch_ms)) / ms,
            "cosine": float(cosine_I.mean()),
            "cosine_least": float(cosine_I.min()),
        }
        if text_TD is not None:
            row["chosen_texts"] = best_texts(case.features_ID, text_TD).tolist()
        table.append(row)
    if text_TD is not None:
        _add_scores(table, right_I, seed)
    return table


def _add_scores(table: list[dict[str, Any]], right_I: Sequence[int | None], seed: int) -> None:
    """How often the text is the one that full chooses and, where it is known, the right one."""
    full = np.array(table[0]["chosen_texts"])
    labelled = [i for i, right in enumerate(right_I) if right is not None]
    right = np.array([right_I[i] for i in labelled])
    for row in table:
        row["same_text"] = float((np.array(row["chosen_texts"]) == full).mean())
    if not labelled:
        return
    hits_GM = np.stack([np.array(row["chosen_texts"])[labelled] == right for row in table], axis=1)
    count = len(labelled)
    means_RM = resampled(hits_GM, np.ones(count), np.random.default_rng(seed))
    for m, row in enumerate(table):
        row["accuracy"] = float(hits_GM[:, m].mean())
        difference = row["accuracy"] - table[0]["accuracy"]
        row["to_full"] = interval(difference, means_RM[:, m] - means_RM[:, 0], count)
