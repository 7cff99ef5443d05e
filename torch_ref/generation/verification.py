"""The run of `torch_ref.verify`: MLX in a process of its own, then PyTorch, method by method."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.hub import resolve_path
from mlx_vlm_prune.checkpoints.reading.files import check_target, write_atomically
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, compose

from ..models.learned import read_learned
from ..models.loading import load_source
from ..models.vlm import VLM
from ..pruners import METHODS, STAGES
from ..pruners.own_twins import register_twins
from .parity import NOISE, OF_LARGEST, RELATIVE, Comparison, Recording, compare

RECORDING = "mlx_vlm_prune.generation.recording"
EVERY = [name for name in METHODS if name not in STAGES["enhancer"]] + ["cls_attention+restore"]
FAULTS = 2  # the exit code of a command that refuses, in one sentence on stderr


def verify(args: argparse.Namespace) -> bool:
    """Compare, print, write; whether all methods agree. Raises UserError."""
    device = device_of(args.device)
    for spec in args.pruner or ():
        register_twins(spec)
    if args.json:
        check_target(args.json, replace=True)
    source, vision = (name and resolve_path(name) for name in (args.source, args.vision))
    with tempfile.TemporaryDirectory() as folder:
        if not args.image:
            args.image = [f"{folder}/scene.png"]
            compose(HELD_OUT_SEEDS[7]).image().save(args.image[0])
        record(args, folder)
        recording = Recording.read(Path(folder))
    methods = recording.facts["methods"]
    refused = [method for method in methods if "refused" in method]
    if args.pruner and refused:
        raise UserError(refused[0]["refused"])
    model = load_source(source, vision, device)
    if recording.facts["N"] != model.N:
        raise UserError(
            f"the two hold different models: an image is {recording.facts['N']} visual tokens in"
            f" MLX and {model.N} in PyTorch"
        )
    model.learned = dict(read_learned(resolve_path(args.model), model))
    numbers = [number for number, method in enumerate(methods) if "refused" not in method]
    rows = [
        compare(model, recording, number)
        for number in tqdm(numbers, desc="PyTorch", file=sys.stderr)
    ]
    print(table(rows, refused, model.N))
    if args.json:
        result = as_json(args, rows, refused, recording, model)
        write_atomically(args.json, json.dumps(result, indent=4, ensure_ascii=False) + "\n")
    return all(row.verdict != "apart" for row in rows)


def device_of(name: str) -> torch.device:
    """Raises UserError for a device that is not there."""
    is_there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not is_there[name]:
        raise UserError(f"device is {name!r}, which PyTorch does not find on this machine")
    torch.backends.cudnn.allow_tf32 = False  # convolutions would round to 10 bits
    return torch.device(name)


def record(args: argparse.Namespace, folder: str) -> None:
    """MLX's side, in a process of its own: no code is shared, and one model is in memory at a time.

    Its own sentence says what it refuses, and ends this process too.
    """
    options = {"--prompt": args.prompt, "--keep-ratio": args.keep_ratio, "--out": folder,
               "--max-tokens": args.max_tokens, "--device": args.mlx_device}  # fmt: skip
    command = [sys.executable, "-m", RECORDING, args.model]
    command += [f"{flag}={value}" for flag, value in options.items() if value is not None]
    command += [f"--image={image}" for image in args.image]
    command += [f"--pruner={spec}" for spec in args.pruner or EVERY]
    home = str(Path(__file__).parents[2])  # where mlx_vlm_prune lies, too
    paths = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    code = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}).returncode
    if code == FAULTS:
        sys.exit(FAULTS)
    if code:
        raise UserError(f"MLX's process ended with code {code}")


def table(rows: Sequence[Comparison], refused: Sequence[Mapping[str, Any]], N: int) -> str:
    """A row for every method, those refused, and what the columns mean."""
    width = max([10, *(len(row.pruner) for row in rows)])
    lines = [
        f"{'pruner':<{width}} {'kept':>11} {'apart':>6} {'features':>10} {'logits':>10} answer"
    ]
    for row in rows:
        difference = row.difference
        apart = "–" if difference.kept_apart is None else str(difference.kept_apart)
        answer, verdict = f"{row.tokens_equal} of {row.tokens}", "" if row.agrees else row.verdict
        line = (
            f"{row.pruner:<{width}} {f'{row.K} of {N}':>11} {apart:>6}"
            f" {difference.features.of_largest:>10.1e} {difference.logits.of_largest:>10.1e}"
        )
        lines.append(f"{line} {answer:<9} {verdict}".rstrip())
    lines += [f"{method['pruner']:<{width}} refused: {method['refused']}" for method in refused]
    return "\n".join([*lines, "", *_notes(rows)])


def _notes(rows: Sequence[Comparison]) -> list[str]:
    verdicts = [row.verdict for row in rows]
    lines = [
        "apart: tokens that one framework keeps and the other does not. features: the visual rows"
        " that the\nlanguage model reads, logits: of every token of the answer, each the largest"
        " difference as a share of\nthe largest value. answer: greedy tokens that are equal.",
        f"{verdicts.count('agrees')} of {len(rows)} methods agree. To agree means the same tokens,"
        f" and differences of at most {RELATIVE:g}\nof a value and {OF_LARGEST:g} of the largest,"
        " which the order of float32 sums explains.",
    ]
    if count := verdicts.count("near-tie"):
        lines.append(
            f"near-tie ({count}): scores are so nearly equal that noise of {NOISE:g} on the pixels"
            " changes PyTorch's own choice\nas much; no fault, and no agreement."
        )
    return lines


def as_json(
    args: argparse.Namespace, rows: Sequence[Comparison], refused: Sequence[Mapping[str, Any]],
    recording: Recording, model: VLM,
) -> dict[str, Any]:  # fmt: skip
    """The content of --json."""
    environment = recording.facts["environment"]
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    return {
        "command": "verify",
        "source": str(args.source), "model": str(args.model), "images": args.image,
        "prompt": args.prompt, "keep_ratio": args.keep_ratio, "visual_tokens": model.N,
        "tolerance": {"relative": RELATIVE, "of_largest": OF_LARGEST},
        "verdicts": dict(Counter(row.verdict for row in rows)),
        "rows": [row.as_json() for row in rows],
        "refused": list(refused),
        "machine": environment["machine"],
        "versions": {**environment["versions"], "torch": torch.__version__},
        "torch_device": name,
    }  # fmt: skip
