"""How many held-out scenes questions the built-in model answers: `python -m benchmarks.accuracy`.

Every answer is generated greedily from prompt and picture and must match exactly.
Beside each kind stands its majority answer: what one gets without looking. Writes
benchmarks/results/scenes.json, from which benchmarks.report makes the README's table.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_vlm_prune.loading import Processor, load
from mlx_vlm_prune.model import VLM
from mlx_vlm_prune.prompt import Prompt, build
from mlx_vlm_prune.pruners import METHODS, Pruner, resolve
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, KINDS, Question, Scene, question_set

RESULTS = Path(__file__).parent / "results"
LONGEST = 6  # tokens of an answer, its end included
BATCH = 24


def batches(per_kind: int) -> Iterator[list[tuple[Scene, Question]]]:
    """The held-out questions, BATCH at a time."""
    waiting: list[tuple[Scene, Question]] = []
    for scene, questions in question_set(HELD_OUT_SEEDS, per_kind):
        waiting += [(scene, question) for question in questions]
        while len(waiting) >= BATCH:
            yield waiting[:BATCH]
            waiting = waiting[BATCH:]
    if waiting:
        yield waiting


def answers(
    model: VLM, processor: Processor, asked: list[tuple[Scene, Question]], pruner: Pruner, K: int
) -> list[str]:
    """Greedy answers to a batch of questions, each about its own scene."""
    N = model.config.vision.grid[0] * model.config.vision.grid[1]
    rows: list[Prompt] = [
        build(processor.tokenizer, question.text, [N], processor.image_token)
        for _, question in asked
    ]
    pixels = mx.array(np.stack([processor.image(scene.image()) for scene, _ in asked]))
    before = model(rows, pixels.astype(model.projector.weight.dtype), pruner, K)
    token_B1 = mx.argmax(before.logits_BLV[:, -1], axis=-1, keepdims=True)
    said, position_B1 = [token_B1], before.next_B1
    for _ in range(LONGEST - 1):
        logits_B1V = model.step(token_B1, position_B1, before)
        token_B1, position_B1 = (
            mx.argmax(logits_B1V[:, -1], axis=-1, keepdims=True),
            position_B1 + 1,
        )
        said.append(token_B1)
    texts = []
    for ids in np.array(mx.concatenate(said, axis=1)).tolist():
        end = next(
            (i for i, x in enumerate(ids) if x in processor.tokenizer.eos_token_ids), len(ids)
        )
        texts.append(processor.tokenizer.decode(ids[:end]))
    return texts


def accuracy(
    model: VLM, processor: Processor, pruner: Pruner, K: int, per_kind: int
) -> dict[str, float]:
    """The share of right answers of each kind."""
    right: Counter[str] = Counter()
    bar = tqdm(total=per_kind * len(KINDS), desc=f"{pruner.name} {K}", leave=False, file=sys.stderr)
    for asked in batches(per_kind):
        for (_, question), text in zip(
            asked, answers(model, processor, asked, pruner, K), strict=True
        ):
            right[question.kind] += text == question.answer
        bar.update(len(asked))
    return {kind: right[kind] / per_kind for kind in KINDS}


def majority(per_kind: int) -> dict[str, float]:
    """The share of the most frequent answer of each kind."""
    given: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for _, questions in question_set(HELD_OUT_SEEDS, per_kind):
        for question in questions:
            given[question.kind][question.answer] += 1
    return {kind: max(given[kind].values()) / per_kind for kind in KINDS}


def main() -> None:
    known = [name for name in METHODS if name not in ("none", "attention_pool")]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--per-kind", type=int, default=500, help="questions of each kind")
    parser.add_argument("--pruner", action="append", help="repeat for several; default: all")
    parser.add_argument("--keep-tokens", type=int, action="append", help="default: 98 and 49")
    args = parser.parse_args()
    model, processor = load()
    N = model.config.vision.grid[0] * model.config.vision.grid[1]
    pruned = [(spec, K) for K in args.keep_tokens or (98, 49) for spec in args.pruner or known]
    measured = []
    for spec, K in [("none", N), *pruned]:
        figures = accuracy(model, processor, resolve(spec), K, args.per_kind)
        measured.append({"pruner": spec, "tokens": K, "accuracy": figures})
        shown = "  ".join(f"{kind} {v:.1%}" for kind, v in figures.items())
        print(f"{spec:<15}{K:>4}  {shown}", flush=True)
    about = {"per_kind": args.per_kind, "majority": majority(args.per_kind), "rows": measured}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "scenes.json").write_text(json.dumps(about, indent=4) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
