"""Converting a 2 GB checkpoint beside copying its file: `python -m benchmarks.conversion`.

Copies and conversions alternate on the same disk, and are timed until the bytes are on it (fsync).
The conversion runs in a process: its time includes the start and the import of torch, and its peak
memory is the operating system's figure. Of the two generations one is converted without a change,
in the other the rows of queries and keys are permuted. `--save` writes results/conversion.json; the
last line is the same JSON.
"""

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_vlm_prune.checkpoints.config import CLIPConfig, MiniMindConfig, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError, missing_package
from mlx_vlm_prune.checkpoints.minimind.generations import GENERATIONS
from mlx_vlm_prune.checkpoints.names.rules import to_published
from mlx_vlm_prune.checkpoints.shapes import expected_shapes

from .command_line import parser, positive, run_command

GENERATION_NAMES = ("minimind2-v", "minimind2-v-2025-02")


def write_published(file: Path, name: str, layers: int) -> None:
    """Write a random checkpoint in float16 under the published names, the tower included."""
    import torch

    table, state = GENERATIONS[name].table, {}
    text = MiniMindConfig(2048, 5632, layers, 8, 2, 6400)
    shapes = expected_shapes(VLMConfig(CLIPConfig(), text))
    for ours, shape in tqdm(shapes.items(), desc=f"making {name}", leave=False):
        published = to_published(table, ours)
        assert published
        published_name, rule = published
        if rule.reordering and rule.reordering.axes == 4:
            shape = (shape[0], shape[3], shape[1], shape[2])
        bits = torch.randint(0, 15360, shape, dtype=torch.int16)  # finite, positive
        state[published_name] = bits.view(torch.float16)
    torch.save(state, file)


def time_copy(source: Path, target: Path) -> float:
    """Seconds to copy a file and flush it to the disk."""
    begin = time.perf_counter()
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def run_conversion(source: Path, target: Path, tokenizer: Path) -> tuple[float, float]:
    """Seconds of a conversion in a new process, and its peak memory in MB."""
    command = [sys.executable, "-m", "mlx_vlm_prune", "convert", "to-mlx", str(source), str(target)]
    begin = time.perf_counter()
    command += ["--tokenizer", str(tokenizer)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        _, status, usage = os.wait4(run.pid, 0)
        run.returncode = os.waitstatus_to_exitcode(status)
    if run.returncode:
        raise UserError(f"{source} could not be converted")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - begin, usage.ru_maxrss * unit / 1e6


def measure(name: str, folder: Path, layers: int, runs: int) -> dict:
    """Alternate copies and conversions; the seconds of all runs, and the ratio of medians."""
    from mlx_vlm_prune.scenes import CHECKPOINT

    source = folder / f"{name}.pth"
    # In another process: Linux counts a parent's memory in its children's peak.
    writer = multiprocessing.get_context("spawn").Process(
        target=write_published, args=(source, name, layers)
    )
    writer.start()
    writer.join()
    if writer.exitcode:
        raise UserError(f"{source} could not be written")
    copies, conversions, peaks = [], [], []
    time_copy(source, folder / "warm")
    (folder / "warm").unlink()
    for _ in tqdm(range(runs), desc=name, leave=False):
        copies.append(time_copy(source, folder / "copy"))
        (folder / "copy").unlink()
        seconds, peak = run_conversion(source, folder / "mlx", CHECKPOINT)
        shutil.rmtree(folder / "mlx")
        conversions.append(seconds)
        peaks.append(peak)
    megabytes = source.stat().st_size / 1e6
    source.unlink()
    copy, conversion = statistics.median(copies), statistics.median(conversions)
    return {
        "generation": name,
        "megabytes": round(megabytes),
        "copy_s": [round(s, 2) for s in copies],
        "conversion_s": [round(s, 2) for s in conversions],
        "speed_of_copying": round(copy / conversion, 3),
        "peak_megabytes": round(max(peaks)),
        "peak_above_file_megabytes": round(max(peaks) - megabytes),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print both generations; the result."""
    if find_spec("torch") is None:  # not imported here: its memory would count
        raise missing_package("torch")
    rows = []
    for name in GENERATION_NAMES:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = measure(name, Path(folder), args.layers, args.runs)
        rows.append(row)
        print(
            f"{name}: {row['megabytes']} MB, converted at {row['speed_of_copying']:.2f} times the "
            f"speed of copying, peak {row['peak_megabytes']} MB "
            f"({row['peak_above_file_megabytes']:+} MB beside the file)",
            flush=True,
        )
    return {"rows": rows}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("conversion", __doc__)
    p.add_argument("--layers", type=positive, default=22, help="layers of the model; 22 make 2 GB")
    p.add_argument("--runs", type=positive, default=5, help="runs of each conversion")
    p.add_argument("--folder", type=Path, help="on the disk to measure (default: a temporary one)")
    return p.parse_args(argv)


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
