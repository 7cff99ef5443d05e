"""EfficientVLM's own table on scenes: `python -m benchmarks.efficientvlm --save`.

The built-in model with an untrained projector is trained in both stages (stages `pretrain`, with
the last layer of the language model as its authors do, and `sft`) without pruning and behind an
`attention_pool` that keeps 75, 50 and 25 % of the visual tokens, all from the same start on the
same examples in the same order. An untrained projector is the start of EfficientVLM's first stage,
too; the built-in one knows unpruned pictures only, which would favour the row without pruning.

Each training and each evaluation is kept in a folder: an interrupted run goes on by the same
command. `--timings-only` measures the times again, full and pruned in turns (benchmarks/speed.py),
beside the accuracies that are there. The last line is one JSON object of all figures.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_prune import evaluate
from mlx_vlm_prune.checkpoints.config import CONFIG
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.checkpoints.reading.files import read_json
from mlx_vlm_prune.checkpoints.writing import write_folder
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.models.arrays import to_raw
from mlx_vlm_prune.scenes import CHECKPOINT
from mlx_vlm_prune.training.config import TrainConfig
from mlx_vlm_prune.training.run import train

from . import scenes_data, speed
from .command_line import parser, positive, run_command
from .readme_tables import efficientvlm_rows

POOL = "attention_pool"
CASES = (("none", 196), (POOL, 147), (POOL, 98), (POOL, 49))
STAGES = {
    "pretrain": {"learning_rate": 2e-3, "language_layers": 1},
    "sft": {"learning_rate": 5e-4},
}


def write_start(folder: Path) -> None:
    """The built-in model without its pruners, its projector drawn again."""
    checkpoint, rng = read_checkpoint(CHECKPOINT), np.random.default_rng(0)
    drawn = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith("projector."):
            bound = checkpoint.tensors["projector.weight"].shape[1] ** -0.5  # as nn.Linear's
            values = rng.uniform(-bound, bound, tensor.shape).astype(np.float32)
            drawn[name] = to_raw(mx.array(values)).astype(tensor.dtype)
    tensors = {**checkpoint.tensors, **drawn}
    write_folder(replace(checkpoint, tensors=tensors, learned={}, learned_file=None), folder)


def write_data(folder: Path, examples: int) -> None:
    """Scenes, each question an example."""
    kinds = [*scenes_data.KINDS, "content"]
    options = ["--format", "jsonl", "--separate", "--turns", "2", "--valid", "16"]
    scenes = ["--examples", str(max(1, examples // 2)), "--kinds", *kinds]
    scenes_data.main([*options, *scenes, "--out", str(folder)])


def train_case(args: argparse.Namespace, pruner: str, K: int) -> Path:
    """Both stages, each unless it was trained before; the model's folder."""
    model = args.folder / "start"
    for stage, settings in STAGES.items():
        output = args.folder / f"{pruner}-{K}-{stage}"
        if not (output / CONFIG).exists():
            keep = {} if pruner == "none" else {"keep_tokens": K}
            values = {
                "stage": stage, "model": str(model), "data": str(args.folder / "data"),
                "output": str(output), "pruner": pruner, "iters": args.steps, "batch_size": 16,
                "resume": True, "steps_per_eval": args.steps, "val_batches": 2, **settings, **keep,
            }  # fmt: skip
            train(TrainConfig.of(values, "benchmarks.efficientvlm"))
        model = output
    return model


def judge(args: argparse.Namespace, pruner: str, K: int) -> dict[str, Any]:
    """Accuracy on scenes that are held out, of the case's model behind its pruner."""
    model, out = train_case(args, pruner, K), args.folder / f"{pruner}-{K}.json"
    if not out.exists():
        keep = [] if pruner == "none" else ["--keep-tokens", str(K)]
        questions = ["--per-kind", str(args.per_kind), "--out", str(out)]
        evaluate.main(["--model", str(model), "--pruner", pruner, *keep, *questions])
    rows = read_json(out)["rows"]
    row = next(row for row in rows if row["pruner"].split(":")[0] == pruner)
    return {"pruner": pruner, "tokens": K, "overall": row["overall"], "accuracy": row["accuracy"]}


def timings(args: argparse.Namespace) -> dict[str, Any]:
    """Of the built-in model's shape, behind each case's pruner."""
    kept = [word for _, K in CASES[1:] for word in ("--keep-tokens", str(K))]
    options = ["--shape", "scenes", "--pruner", POOL, "--runs", str(args.runs), "--tokens", "32"]
    return speed.run(speed.parse([*options, *kept]))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, judge and time; the result, of which the table is printed."""
    cases_file = args.folder / "cases.json"
    if args.timings_only:
        if not cases_file.exists():
            raise UserError(f"{cases_file} is missing: run without --timings-only first")
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        if not (args.folder / "data").exists():
            write_data(args.folder / "data", 2 * 16 * args.steps)
        if not (args.folder / "start" / CONFIG).exists():
            write_start(args.folder / "start")
        cases = [judge(args, *case) for case in CASES]
        cases_file.write_text(json.dumps({"cases": cases}))
    result = {
        "benchmark": "efficientvlm", "steps": args.steps, "per_kind": args.per_kind,
        "machine": describe_machine(), "versions": versions(), "load": os.getloadavg()[0],
        "cases": read_json(cases_file)["cases"], "timings": timings(args),
    }  # fmt: skip
    print(efficientvlm_rows(result))
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("efficientvlm", __doc__)
    add = p.add_argument
    add("--folder", type=Path, default=Path("efficientvlm"), help="where runs are kept")
    add("--steps", type=positive, default=130, help="of 16 examples, in each stage")
    add("--per-kind", type=positive, default=100, help="questions of each kind")
    add("--runs", type=positive, default=20, help="timed runs of each case")
    add("--timings-only", action="store_true", help="measure the times again")
    return p.parse_args(argv)


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
