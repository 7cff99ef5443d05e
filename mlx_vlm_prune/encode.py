"""Embeddings of images by a CLIP or SigLIP with fewer visual tokens: speed, and what it costs.

mlx-vlm-prune encode --model clip-vit-base-patch16 --image photos --pruner patch_norm

Every case (all tokens, then each method at each budget) encodes a batch of images before the next.
For each: milliseconds of an image, images per second, the cosine between its embedding and that of
all tokens and, where classes are given, zero-shot accuracy.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from .checkpoints.command_line import SEVERAL, Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import (
    atomic_path,
    check_target,
    write_atomically,
    write_safetensors,
)
from .evaluation.encoding import Case, cases_of, encode_batches, rows
from .evaluation.encoding_table import table
from .evaluation.labelled_images import TEMPLATES, ImageFile, find_images, texts_of_classes
from .generation.arguments import add_max_pixels
from .generation.request import list_images, pixel_limit
from .inputs.budget import budget, check_budget
from .inputs.captions import EncoderProcessor
from .inputs.image import open_image
from .inputs.image_sources import ImageSource
from .machine import blas
from .machine.hardware import describe_machine, versions
from .models.arrays import to_raw
from .models.dual_encoder import DualEncoder
from .models.loading import DTYPES, find_folder, load_dual_encoder
from .pruners import Pipeline, Pruner, plan
from .pruners.own_methods import method_spec

__all__ = ["encode_images", "encode_texts", "load_encoder", "main"]

DESCRIPTION = """Encode images by a CLIP or SigLIP with fewer visual tokens, and compare with all of
them: milliseconds of an image, images per second, the cosine of the embeddings and, where classes
are given, zero-shot accuracy."""
EPILOG = """example: mlx-vlm-prune encode --model clip-vit-base-patch16 --image photos
--pruner patch_norm --keep-ratio 1.0 0.7 0.5 --text "a photo of a cat" "a photo of a dog"
"""
RATIOS = (1.0, 0.7, 0.5)
TEXT_BATCH = 64


def load_encoder(
    path_or_hub_name: str | Path, *, dtype: str = "auto", revision: str | None = None
) -> tuple[DualEncoder, EncoderProcessor]:
    """A whole CLIP or SigLIP from a folder in Hugging Face's layout, and its processor.

    `dtype` is as in `load`. Raises UserError, in one sentence, for whatever cannot be loaded.
    """
    blas.load()  # says what is wrong with a library that the user named
    folder = find_folder(path_or_hub_name, revision)
    return load_dual_encoder(folder, str(path_or_hub_name), dtype)


def encode_images(
    model: DualEncoder,
    processor: EncoderProcessor,
    images: ImageSource | Sequence[ImageSource],
    pruner: str | Pruner | Pipeline = "none",
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    batch_size: int = 8,
) -> mx.array:
    """Embeddings of I images, (I, D), from K of each one's N visual tokens.

    They are not normalised: with all tokens those of transformers' `get_image_features`. An image
    is as in `generate`. The budget is as in `generate`. Raises UserError.
    """
    pipeline = plan(pruner)
    model.check(pipeline)
    K = budget(model.N, keep_ratio, keep_tokens, pipeline)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    sources = iter(list_images(images))
    parts = []
    while batch := list(islice(sources, batch_size)):
        pixels = np.stack([processor.image(open_image(source)) for source in batch])
        parts.append(model.encode_images(mx.array(pixels).astype(model.dtype), pipeline, K))
        mx.eval(parts[-1])
    return mx.concatenate(parts) if parts else mx.zeros((0, model.config.dims))


def encode_texts(
    model: DualEncoder, processor: EncoderProcessor, texts: str | Sequence[str]
) -> mx.array:
    """Embeddings of T texts, (T, D), not normalised, as `get_text_features` gives them.

    Raises UserError for a text that is too long, or where the folder has no tokenizer.json.
    """
    listed = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, str) else [texts]
    parts = []
    for begin in range(0, len(listed), TEXT_BATCH):
        ids_TL = processor.captions(listed[begin : begin + TEXT_BATCH])
        parts.append(model.encode_texts(ids_TL))
        mx.eval(parts[-1])
    return mx.concatenate(parts) if parts else mx.zeros((0, model.config.dims))


# fmt: off
def build_parser() -> Parser:
    """The command line of `encode`, its options in groups."""
    parser = Parser("mlx_vlm_prune.encode", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument_group("model").add_argument
    add("--model", help="folder or Hugging Face name of a CLIP or SigLIP (no default)")
    add("--revision", metavar="REVISION",
        help="branch, tag or commit of a Hugging Face name (default: its main branch)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="type of the weights and of the computation; auto is float32 on a CPU and the"
        " checkpoint's own type on a GPU")
    add = parser.add_argument_group("images and texts").add_argument
    add("--image", type=Path, **SEVERAL, default=[], metavar="PATH",
        help="image files and folders; in a folder, a sub-folder's name is the class of its images"
        " (no default)")
    add_max_pixels(add)
    add("--labels", type=Path, metavar="FILE.csv",
        help="the classes of the images, in columns file_name and label (default: none)")
    add("--text", **SEVERAL, default=[], metavar="TEXT",
        help="texts to compare the images with; each class must be in one of them (default: one"
        " per class, by the template)")
    add("--template", metavar="TEXT", help="text of a class; {} is replaced by its name (default:"
        f" {', '.join(f'{title} {text}' for title, text in TEMPLATES.items())})")
    add("--limit", type=int, metavar="N", help="only the first N images (default: all)")
    add("--skip-bad", action="store_true", help="skip images that cannot be read, and list"
        " them")
    add = parser.add_argument_group("pruning").add_argument
    add("--pruner", **SEVERAL, type=method_spec, default=[], metavar="SPEC",
        help="methods or chains, as in `generate` (default: only all tokens)")
    add("--keep-ratio", type=float, **SEVERAL, metavar="R",
        help="shares of the visual tokens to keep (default: 1.0 0.7 0.5)")
    add("--keep-tokens", type=int, **SEVERAL, metavar="K",
        help="numbers of visual tokens to keep (default: none)")
    add = parser.add_argument_group("run and output").add_argument
    add("--batch-size", type=int, default=8, metavar="N", help="images encoded at once")
    add("--runs", type=int, default=1, metavar="N",
        help="times that each batch is encoded and timed")
    add("--out", type=Path, metavar="FILE.safetensors",
        help="write the embeddings: full, METHOD@TOKENS and text (default: no)")
    add("--json", type=Path, metavar="FILE", help="write all figures (default: no)")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Encode all images by all cases, print, and write the files."""
    _check(args)
    images = find_images(args.image, args.labels)[: args.limit]
    model, processor = load_encoder(args.model, dtype=args.dtype, revision=args.revision)
    cases, refused = cases_of(model, args.pruner, _budgets(args))
    labels = [image.label for image in images if image.label is not None]
    template = args.template or TEMPLATES[model.config.title]
    texts, number_of = texts_of_classes(labels, args.text, template)
    text_TD = encode_texts(model, processor, texts) if texts else None
    pictures = Pictures(images, processor, args)
    _encode(model, cases, pictures, args.runs)
    right_I = [None if i.label is None else number_of[i.label] for i in pictures.read]
    text_array = None if text_TD is None else np.array(text_TD.astype(mx.float32))
    result = {
        "command": "encode",
        "model": args.model,
        "model_type": model.config.title,
        "images": len(pictures.read),
        "labelled": sum(right is not None for right in right_I),
        "batch_size": args.batch_size,
        "runs": args.runs,
        "image_ms": pictures.ms / len(pictures.read),
        "dtype": str(model.dtype).removeprefix("mlx.core."),
        "machine": describe_machine(),
        "versions": versions(),
        "texts": texts,
        "files": [image.name for image in pictures.read],
        "right_texts": right_I,
        "rows": rows(cases, text_array, right_I),
        "refused": refused,
        "skipped": pictures.skipped,
    }
    _write(args, result, cases, text_TD)


class Pictures:
    """The pixels of image files in batches; notes which were read, and how long that took."""

    def __init__(
        self, images: Sequence[ImageFile], processor: EncoderProcessor, args: argparse.Namespace
    ) -> None:
        self.images, self.processor = images, processor
        self.batch_size, self.skip = args.batch_size, args.skip_bad
        self.max_pixels = pixel_limit(args.max_pixels, None)
        self.read: list[ImageFile] = []
        self.skipped: list[str] = []
        self.ms = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        """(B, H, W, 3). Raises UserError for an image that cannot be read, unless it is skipped."""
        batch: list[np.ndarray] = []
        for image in self.images:
            start = time.perf_counter()
            try:
                batch.append(self.processor.image(open_image(image.path, self.max_pixels)))
                self.read.append(image)
            except UserError as e:
                if not self.skip:
                    raise
                self.skipped.append(str(e))
            self.ms += 1000 * (time.perf_counter() - start)
            if len(batch) == self.batch_size:
                yield np.stack(batch)
                batch = []
        if batch:
            yield np.stack(batch)
        if not self.read:
            raise UserError(f"no image could be read: {self.skipped[0]}")


def _encode(model: DualEncoder, cases: list[Case], pictures: Pictures, runs: int) -> None:
    """With a bar on stderr; an interrupt ends in one line and exit code 130."""
    count = len(pictures.images)
    total = len(cases) * (runs * count + min(pictures.batch_size, count))  # each case warms up
    try:
        with tqdm(total=total, desc="encoding", unit="image", delay=1, leave=False) as bar:
            for images in encode_batches(model, cases, iter(pictures), runs):
                bar.update(images)
    except KeyboardInterrupt:
        done = min(case.images for case in cases)
        line = f"interrupted: {done} of {count} images are encoded; nothing is written"
        print(f"\n{line}", file=sys.stderr)
        sys.exit(130)


def _write(
    args: argparse.Namespace, result: dict[str, Any], cases: list[Case], text_TD: mx.array | None
) -> None:
    """Print the table, and write the files."""
    print(table(result))
    if args.out:
        arrays = {case.key: mx.array(case.features_ID) for case in cases}
        arrays |= {} if text_TD is None else {"text": text_TD.astype(mx.float32)}
        with atomic_path(args.out, replace=True) as beside:
            write_safetensors(beside, {name: to_raw(x) for name, x in arrays.items()}, "mlx")
        print(f"Wrote {args.out}: {', '.join(arrays)}")
    if args.json:
        write_atomically(args.json, json.dumps(result, indent=4, ensure_ascii=False) + "\n")
        print(f"Wrote {args.json}")


def _budgets(args: argparse.Namespace) -> list[float]:
    """Numbers of tokens are ints, shares floats."""
    return [*(args.keep_ratio or (() if args.keep_tokens else RATIOS)), *(args.keep_tokens or ())]


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that would fail only later."""
    if not (args.model and args.image):
        raise UserError("give a model, which is a CLIP or SigLIP, and images to encode")
    for name in ("limit", "batch_size", "runs"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for ratio in args.keep_ratio or ():
        check_budget(ratio, None)
    for K in args.keep_tokens or ():
        check_budget(None, K)
    if (args.keep_ratio or args.keep_tokens) and not args.pruner:
        raise UserError("a budget needs a pruner, for example patch_norm")
    pixel_limit(args.max_pixels, None)
    if args.template and args.text:
        raise UserError("give text or template, not both")
    for file in filter(None, (args.out, args.json)):
        check_target(file, replace=True)


if __name__ == "__main__":
    main()
