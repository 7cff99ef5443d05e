"""A calibration of a model of mlx-vlm's, whose images may differ in their visual tokens.

Pictures of up to three sizes are run. What the tower and the pruner take for another image lies on
straight lines between these sizes, at the same share of kept tokens; below the smallest it is the
smallest's. What the prefill takes follows from its rows.

Shapes: S sizes, N visual tokens of a picture that was run, n of an image of a prompt, K kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .calibration import DAMAGED, STATISTICS, Calibration, check_figures, read_content, slack
from .prediction import (
    Run,
    Table,
    by_rows,
    by_tokens,
    images_factor,
    most_run,
    tabulate,
    text_factor,
)

RESIZE = "a smaller image (resize_shape) may"
SAME_SHAPE = 1.4  # times as long for its width as another picture, at most; half of one is 2


@dataclass(frozen=True)
class SizedRun(Run):
    """A run about pictures of N visual tokens each: the rows that the language model read (in the
    average layer), the bytes of its cache, and those that the tower's output holds meanwhile."""

    N: int
    rows: int
    cache_bytes: int
    held_bytes: int

    @property
    def prefill_bytes(self) -> float:
        """Those of the prefill alone."""
        return max(0.0, self.nbytes["prefill"] - self.held_bytes)


@dataclass(frozen=True)
class HostCalibration:
    """Runs of one model with one pruner, in order, and the environment that they are valid for.

    `pictures` are width, height and N of each size, N ascending. `in_tower`: the tower's work
    depends on K.
    """

    pruner: str
    pictures: tuple[tuple[int, int, int], ...]
    runs: tuple[SizedRun, ...]
    environment: Mapping[str, Any]
    in_tower: bool = False

    @cached_property
    def row_bytes(self) -> float:
        """The bytes of a cache row in all layers."""
        return median(run.cache_bytes / run.rows for run in self.runs if run.K == run.N)

    @cached_property
    def sizes(self) -> dict[int, Calibration]:
        """The runs about each size, by N, ascending."""
        runs = {N: tuple(run for run in self.runs if run.N == N) for _, _, N in self.pictures}
        inside = self.in_tower
        return {N: Calibration(self.pruner, N, inside, 0, of_N, {}) for N, of_N in runs.items()}

    @cached_property
    def held(self) -> list[tuple[list[float], list[float]]]:
        """Of each size the shares of tokens that stayed, ascending, and the bytes that the tower's
        output for one image then holds."""
        of_sizes = []
        for N in self.sizes:
            of_K: dict[int, list[int]] = {}
            for run in sorted(self.runs, key=lambda run: run.K):
                if run.N == N and run.images == 1:
                    of_K.setdefault(run.K, []).append(run.held_bytes)
            of_sizes.append(([K / N for K in of_K], [median(held) for held in of_K.values()]))
        return of_sizes

    @cached_property
    def slack(self) -> float:
        """The factor that 19 of 20 runs exceed their prediction by, at most."""
        expected = [sum(self.sizes[run.N].ms(*run.setting).values()) for run in self.runs]
        return slack(self.runs, np.array(expected))

    @cached_property
    def prefills(self) -> dict[str, Table]:
        """Every run as one of its number of rows, be they words or visual tokens, without what the
        tower's output holds."""
        runs = [
            Run(run.rows, 0, 1, run.ms, {**run.nbytes, "prefill": run.prefill_bytes})
            for run in self.runs
        ]
        return {name: tabulate(runs, name, f, False) for name, f in STATISTICS.items()}

    @cached_property
    def scaled(self) -> list[int]:
        """The visual tokens of each smaller picture in the shape of the largest, as resizing makes
        them. Where it changes none, pictures of another shape may have been run."""
        *smaller, (width, height, _) = self.pictures
        return [
            N for w, h, N in smaller
            if w * height < SAME_SHAPE * h * width and h * width < SAME_SHAPE * w * height
        ]  # fmt: skip

    @property
    def most_run(self) -> tuple[int, int]:
        """The most text, and the most images."""
        return most_run(self.runs)

    def covers(self, text: int, tokens: Sequence[int]) -> bool:
        """Whether as much text, as many images and as large ones were run; `tokens` are each n."""
        most_text, most_images = self.most_run
        is_read = text <= most_text and len(tokens) <= most_images
        return bool(is_read and max(tokens) <= self.pictures[-1][2])

    def held_bytes(self, n: int, share: Any) -> Any:
        """What the tower's output holds for one image of n tokens, of which a share stays."""
        return self._between(n, [np.interp(share, *of_size) for of_size in self.held])

    def of_image(self, figure: str, part: str, n: int, share: Any) -> Any:
        """What a part takes for one image of n tokens, of which a share stays."""
        sizes = self.sizes.items()
        return self._between(
            n, [by_tokens(size.tables[figure], part, N, share * N) for N, size in sizes]
        )

    def _between(self, n: int, value_S: Sequence[Any]) -> Any:
        """The figure of an image of n tokens by those of the sizes; above the largest in proportion
        to it."""
        place = float(np.interp(n, [*self.sizes], range(len(value_S))))
        low, high = value_S[int(place)], value_S[min(int(place) + 1, len(value_S) - 1)]
        return (low + (place % 1) * (high - low)) * max(1.0, n / self.pictures[-1][2])

    def factor(self, figure: str, part: str, text: int, images: int) -> float:
        """How many times as much a part takes with more text, and with several images at once as
        with each alone."""
        total = 1.0
        for N, size in self.sizes.items():
            table = size.tables[figure]
            if (table["images"] > 1).any():
                total *= float(images_factor(table, part, N, images)) / images
            if part == "pruner":
                total *= float(text_factor(table, part, N, text))
        return total


@dataclass(frozen=True)
class ImagesCalibration:
    """A calibration for the images of a prompt, as `budgets.choose` takes it.

    `tokens` are each image's n; one that has fewer than K keeps all. `full_rows` are the rows of
    all images where nothing is pruned.
    """

    calibration: HostCalibration
    tokens: tuple[int, ...]
    full_rows: int

    @property
    def in_tower(self) -> bool:
        return self.calibration.in_tower

    @property
    def pruner(self) -> str:
        return self.calibration.pruner

    @property
    def N(self) -> int:
        """The most visual tokens of an image."""
        return max(self.tokens)

    @property
    def row_bytes(self) -> float:
        return self.calibration.row_bytes

    @property
    def slack(self) -> float:
        return self.calibration.slack

    @property
    def alternatives(self) -> str:
        """A smaller image, where it becomes fewer tokens."""
        return RESIZE if any(n < self.N for n in self.calibration.scaled) else ""

    def kept(self, K: Any) -> np.ndarray:
        """How many tokens stay of each image, (..., I)."""
        return np.minimum(np.asarray(K)[..., None], self.tokens)

    def rows(self, K: Any, text: Any, images: Any) -> Any:
        """The rows of the prompt."""
        visual = self.kept(K).sum(axis=-1)
        return text + np.where(visual == sum(self.tokens), self.full_rows, visual)

    def ms(self, K: Any, text: Any, images: Any) -> dict[str, Any]:
        """The predicted ms of each part up to the first token, without opening the images."""
        return self._predict("ms", K, text)

    def nbytes(self, K: Any, text: Any, images: Any) -> dict[str, Any]:
        """The predicted most bytes that each part holds beside the weights and the pixels."""
        parts, share_I = self._predict("nbytes", K, text), self._shares(K)
        held = [
            self.calibration.held_bytes(n, share_I[..., image])
            for image, n in enumerate(self.tokens)
        ]
        return parts | {"prefill": parts["prefill"] + sum(held)}

    def _shares(self, K: Any) -> np.ndarray:
        """The share of each image's tokens that stays, (..., I)."""
        shares: np.ndarray = self.kept(K) / np.array(self.tokens)
        return shares

    def _predict(self, figure: str, K: Any, text: Any) -> dict[str, Any]:
        calibration, share_I = self.calibration, self._shares(K)
        parts: dict[str, Any] = {}
        for part in ("vision", "pruner"):
            of_images = [
                calibration.of_image(figure, part, n, share_I[..., image])
                for image, n in enumerate(self.tokens)
            ]
            parts[part] = sum(of_images) * calibration.factor(figure, part, text, len(self.tokens))
        rows = self.rows(K, text, len(self.tokens))
        return {**parts, "prefill": by_rows(calibration.prefills[figure], rows)}


def load_host_calibration(path: Path, expected: Mapping[str, Any]) -> HostCalibration | None:
    """The file's calibration, if it is complete and of the expected environment."""
    try:
        content = read_content(path, expected)
        runs = tuple(SizedRun(**run) for run in content.pop("runs"))
        pictures = tuple((int(w), int(h), int(N)) for w, h, N in content.pop("pictures"))
        calibration = HostCalibration(**content, pictures=pictures, runs=runs, environment=expected)
        numbers = [x for run in runs for x in (run.N, run.rows, run.cache_bytes, run.held_bytes)]
        check_figures([*numbers, *(x for picture in pictures for x in picture)], runs)
        with np.errstate(divide="raise", invalid="raise"):  # fails where runs are missing
            of_one = ImagesCalibration(calibration, (pictures[-1][2],), pictures[-1][2])
            calibration.slack, of_one.nbytes(1, 1, 1), calibration.row_bytes
        return calibration
    except DAMAGED:
        return None
