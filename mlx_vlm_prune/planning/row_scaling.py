"""How the time and the memory of a layer grow with the rows of a prompt: scans and attention.

Layers of the same width with random weights read the same rows in turns, as a prompt is read: in
pieces of `PREFILL_STEP_SIZE`.

Shapes: L rows, D features.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from mlx import nn
from tqdm import tqdm

from ..checkpoints.config import MiniMindConfig
from ..models.cache import LayerCache
from ..models.language import mamba, mamba2
from ..models.language.mamba import MambaState, random_mixer
from ..models.language.mamba2 import random_mixer_2
from ..models.language.minimind import ForwardPass, MiniMind
from ..models.language.selective_scan import multi_resolution_scan
from ..models.layers import PREFILL_STEP_SIZE

SCAN, LOOP, ATTENTION, MAMBA_2 = "scan", "mlx-lm's loop", "attention", "mamba-2"
HEAD_DIM, STATES_2 = 64, 128  # of attention and Mamba-2; states of a feature of Mamba-2's
WARMED_ROWS = 2048  # up to so many rows a layer runs once before it is timed
Layer = Callable[[mx.array], mx.array]  # (1, L, D) to (1, L, D)


@dataclass
class Measurement:
    """What a layer took for so many rows: milliseconds of each run, and its most memory above what
    was held before."""

    layer: str
    rows: int
    ms: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def spread(self) -> tuple[float, float, float]:
        """Median, fastest and slowest run."""
        return statistics.median(self.ms), min(self.ms), max(self.ms)


def layers(hidden_size: int, state_size: int, every: Iterable[int]) -> dict[str, Layer]:
    """The layers by name, with weights that do not change from call to call."""
    mixer = random_mixer(hidden_size, state_size)
    low = _scan(random_mixer(hidden_size, state_size, seed=1))
    scan, gate = _scan(mixer), nn.Linear(hidden_size, hidden_size)
    mx.eval(gate.parameters())

    def multi_resolution(r: int) -> Layer:
        return lambda x_1LD: multi_resolution_scan(scan, low, x_1LD, mx.sigmoid(gate(x_1LD)), r)

    return {
        SCAN: scan,
        LOOP: lambda x_1LD: mixer(x_1LD, None),
        ATTENTION: _attention(hidden_size),
        MAMBA_2: _scan(random_mixer_2(hidden_size, STATES_2, HEAD_DIM), mamba2.mix),
        **{f"mrss r={r}": multi_resolution(r) for r in every},
    }


def _scan(mixer: nn.Module, mix: Callable[..., mx.array] = mamba.mix) -> Layer:
    def scan(x_1LD: mx.array) -> mx.array:
        state = MambaState()
        return _in_pieces(x_1LD, lambda x, begin: mix(mixer, x, state))

    return scan


def _attention(hidden_size: int) -> Layer:
    """Causal attention as our own language models compute it, over a cache that grows."""
    heads = hidden_size // HEAD_DIM
    model = MiniMind(
        MiniMindConfig(
            hidden_size, HEAD_DIM, 1, num_attention_heads=heads, num_key_value_heads=heads,
            vocab_size=1,
        )
    )  # fmt: skip
    mx.eval(model.parameters())

    def attention(x_1LD: mx.array) -> mx.array:
        cache = LayerCache()

        def read(x: mx.array, begin: int) -> mx.array:
            positions = mx.arange(begin, begin + x.shape[1])[None]
            shared = ForwardPass(positions, model.rotary(positions, contiguous=True), ())
            return model.layers[0].self_attn(x, shared, cache)

        return _in_pieces(x_1LD, read)

    return attention


def _in_pieces(x_1LD: mx.array, read: Callable[[mx.array, int], mx.array]) -> mx.array:
    """A layer's rows, read piece by piece from the rows before."""
    pieces = []
    for begin in range(0, x_1LD.shape[1], PREFILL_STEP_SIZE):
        pieces.append(read(x_1LD[:, begin : begin + PREFILL_STEP_SIZE], begin))
        mx.async_eval(pieces[-1])
    return mx.concatenate(pieces, axis=1)


def measure(
    layers: dict[str, Layer], hidden_size: int, sizes: Sequence[int], runs: int, loop_rows: int
) -> list[Measurement]:
    """Time each layer for each number of rows, in turns, with a progress bar.

    The loop reads up to `loop_rows`. Every other round goes backwards.
    """
    x_1LD = mx.random.normal((1, max(sizes), hidden_size), key=mx.random.key(0))
    mx.eval(x_1LD)
    table = {
        (rows, name): Measurement(name, rows)
        for rows in sizes
        for name in layers
        if name != LOOP or rows <= loop_rows
    }
    rounds = [[case for case in table if case[0] == rows] for rows in sizes for _ in range(runs)]
    total = sum(rows * len(cases) for cases in rounds for rows, _ in cases[:1])
    with tqdm(total=total, desc="rows", file=sys.stderr, leave=False) as bar:
        for number, cases in enumerate(rounds):
            for rows, name in cases if number % 2 else cases[::-1]:
                measurement = table[rows, name]
                if not measurement.ms and rows <= WARMED_ROWS:
                    mx.eval(layers[name](x_1LD[:, :rows]))
                _time(measurement, layers[name], x_1LD[:, :rows])
                bar.update(rows)
    return list(table.values())


def _time(measurement: Measurement, layer: Layer, x_1LD: mx.array) -> None:
    """One run, added to the others."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    mx.eval(layer(x_1LD))
    measurement.ms.append(1000 * (time.perf_counter() - start))
    measurement.peak_bytes = max(measurement.peak_bytes, mx.get_peak_memory() - before)


def by_layer(results: Sequence[Measurement]) -> dict[str, dict[int, Measurement]]:
    """Each layer's measurements by rows."""
    named: dict[str, dict[int, Measurement]] = {}
    for result in results:
        named.setdefault(result.layer, {})[result.rows] = result
    return named


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The p of y = c x^p that fits best, by least squares of the logarithms; None for one point."""
    if len({x for x, _ in points}) < 2:
        return None
    logs = [(math.log(x), math.log(y)) for x, y in points]
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*logs, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return slope / sum((x - mean_x) ** 2 for x, _ in logs)


def ratios(slow: Measurement, fast: Measurement) -> tuple[float, float, float]:
    """How many times as long one layer took as its neighbour in the same round: median, least and
    most."""
    values = [a / b for a, b in zip(slow.ms, fast.ms, strict=True)]
    return statistics.median(values), min(values), max(values)
