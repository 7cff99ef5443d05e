"""What the tower and choosing cost on this machine, from the calibrations that are kept of a model.

A calibration (planning/calibration.py) has runs with several numbers of tokens up to the first
token, everything inside; --budget-ms, `explore` and the app make them.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from ...checkpoints.errors import UserError
from ...checkpoints.reading.files import read_json
from ...machine.hardware import environment
from ...machine.user_cache import cache_folder, model_key

DAMAGED = (UserError, KeyError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True)
class FirstToken:
    """Milliseconds to the first token by the share of an image's tokens, which end with all."""

    shares: Sequence[float]
    ms: Sequence[float]

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "FirstToken":
        """Of a calibration's file: one image, the largest that was run, with the shortest text.

        Raises one of DAMAGED.
        """
        alone = [run for run in content["runs"] if run["images"] == 1]
        N = max(run.get("N", content.get("N", 0)) for run in alone)
        of_N = [run for run in alone if run.get("N", N) == N]
        text = min(run["text"] for run in of_N)
        ms_by_share = defaultdict[float, list[float]](list)
        for run in of_N:
            if run["text"] == text:
                ms_by_share[run["K"] / N].append(float(sum(run["ms"].values())))
        shares = sorted(ms_by_share)
        if len(shares) < 2 or shares[-1] != 1:
            raise ValueError("of no two numbers of tokens, or without all")
        return cls(shares, [median(ms_by_share[share]) for share in shares])

    def relative(self, share: float) -> float:
        """The time at a share, as a part of that with all tokens."""
        return float(np.interp(share, self.shares, self.ms)) / self.ms[-1]


def first_tokens(folder: Path | None, dtype: mx.Dtype | None = None) -> dict[str, FirstToken]:
    """By method, what calibrations say of the model in `folder`, in any dtype where none is given,
    that were made on this machine with this software."""
    times: dict[str, FirstToken] = {}
    try:
        key = model_key(folder) if folder else None
    except UserError:
        key = None
    for path in sorted((cache_folder() / "calibrations").glob(f"{key}-*.json")) if key else ():
        try:
            content = read_json(path, most=None)
            about = content["about"]
            expected = about["dtype"] if dtype is None else str(dtype)
            if about == environment(mx.float32) | {"dtype": expected}:
                times[str(content["pruner"])] = FirstToken.of(content)
        except DAMAGED:
            continue
    return times
