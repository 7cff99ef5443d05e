"""Opening a picture, beside Pillow's own steps: `python -m benchmarks.picture`.

Ours checks the file, decodes, resizes, crops and normalises it. Pillow decodes, converts to RGB,
resizes and crops the same bytes, and numpy normalises. Both take turns. All of it runs on one
thread, so CPU time is measured, which other programs disturb less. A JPEG is also decoded at a
fraction of its size (Pillow's `draft`), with how far its grey levels are then from the exact ones.
The pictures show random texture or, with `--image`, a photograph. `--save` writes
benchmarks/results/picture.json; the last line is the same JSON.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.inputs.preprocessor import Preprocessor, siglip_preprocessor
from mlx_vlm_prune.machine.hardware import versions
from mlx_vlm_prune.machine.timing import Gain, spread

from .command_line import natural, parser, positive, run_command

PREPROCESSORS = {
    "clip-224": Preprocessor(),
    "clip-336": Preprocessor(336, (336, 336)),
    "siglip-384": siglip_preprocessor(384),
}
FILES = [("JPEG", (1024, 768)), ("JPEG", (4032, 3024)), ("PNG", (1024, 768))]
DRAFT = 3  # times the side the tower reads


def pillow(data: bytes, preprocessor: Preprocessor) -> np.ndarray:
    """The same steps by Pillow and numpy alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    size = resized_size(preprocessor, image.size)
    image = image.resize(size, preprocessor.resample)
    if preprocessor.crop:
        rows, columns = preprocessor.crop
        left, top = (size[0] - columns) // 2, (size[1] - rows) // 2
        image = image.crop((left, top, left + columns, top + rows))
    pixels = np.asarray(image).astype(np.float32) * np.float32(1 / 255)
    mean, std = (np.array(v, np.float32) for v in (preprocessor.mean, preprocessor.std))
    return (pixels - mean) / std


def resized_size(preprocessor: Preprocessor, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height before the crop."""
    if isinstance(preprocessor.size, tuple):
        return preprocessor.size
    side, shorter = preprocessor.size or min(size), min(size)
    return side * size[0] // shorter, side * size[1] // shorter


def draft(data: bytes, preprocessor: Preprocessor) -> Image.Image:
    """A JPEG decoded at the smallest scale that leaves DRAFT times the side."""
    side = preprocessor.size[0] if isinstance(preprocessor.size, tuple) else preprocessor.size
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (DRAFT * (side or 1), DRAFT * (side or 1)))
    return open_image(image)


def encoded(photo: Image.Image, kind: str, size: tuple[int, int], grain: int) -> bytes:
    """The photograph at this size, with grain as a sensor has it, as a file's bytes."""
    noise = np.random.default_rng(0).normal(0, grain, (size[1], size[0], 1))
    pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC)) + noise
    buffer = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, kind, quality=90)
    return buffer.getvalue()


def measure(data: bytes, preprocessor: Preprocessor, runs: int) -> dict[str, Any]:
    """Milliseconds of each way in turns, Pillow's by ours, and the draft's distance."""
    ways: dict[str, Callable[[], Any]] = {
        "pillow": lambda: pillow(data, preprocessor),
        "ours": lambda: preprocessor(open_image(data)),
    }
    if data.startswith(b"\xff\xd8"):
        ways["draft"] = lambda: preprocessor(draft(data, preprocessor))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(runs + 1):
        for way, call in ways.items():
            began = time.process_time()
            call()
            times[way].append(1000 * (time.process_time() - began))
    figures: dict[str, Any] = {
        "ms": {way: spread(each[1:]) for way, each in times.items()},
        "pillow_by_ours": vars(Gain.of(times["pillow"][1:], times["ours"][1:])),
    }
    if "draft" in ways:
        exact, near = (
            np.asarray(preprocessor.visible(image)).astype(int)
            for image in (open_image(data), draft(data, preprocessor))
        )
        off = np.abs(exact - near)
        figures["draft_levels"] = {"mean": float(off.mean()), "max": int(off.max())}
    return figures


def run(args: argparse.Namespace) -> dict[str, Any]:
    texture = np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    photo = open_image(args.image) if args.image else Image.fromarray(texture)
    rows = []
    for kind, size in FILES:
        data = encoded(photo, kind, size, args.grain)
        for name, preprocessor in PREPROCESSORS.items():
            figures = measure(data, preprocessor, args.runs)
            rows.append({"file": f"{kind} {size[0]} x {size[1]}", "for": name, **figures})
            ms, ratio = figures["ms"], figures["pillow_by_ours"]
            medians = ", ".join(f"{way} {each['median']:.1f} ms" for way, each in ms.items())
            print(
                f"{rows[-1]['file']:16} {name:10} {medians}; pillow / ours {ratio['median']:.2f}"
                f" [{ratio['p10']:.2f}, {ratio['p90']:.2f}] {figures.get('draft_levels', '')}",
                file=sys.stderr,
            )
    return {"versions": versions(), "runs": args.runs, "grain": args.grain, "rows": rows}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = parser("picture", __doc__)
    p.add_argument("--image", type=Path, metavar="FILE", help="a photograph (default: texture)")
    p.add_argument("--grain", type=natural, default=6, help="of the sensor, in grey levels")
    p.add_argument("--runs", type=positive, default=15, help="of each way (default: 15)")
    return p.parse_args(argv)


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
