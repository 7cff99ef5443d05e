"""How many held-out scenes questions each method answers: `python -m benchmarks.accuracy`.

An answer is right when greedy decoding gives it, its end included: so when at every one of
its words the model finds the next one likeliest. Beside each kind stands its majority answer, what
one gets without looking; beside each method the difference to full and to `random` with a
95 % interval (paired bootstrap over the questions). Every question is asked of all methods
before the next, and what was reached is kept beside the result, so an interrupted run goes
on where it was. Writes benchmarks/results/scenes.json, from which benchmarks.report makes
the tables.

Shapes: B questions, I their images, A tokens of the longest answer, V words.
"""

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten
from tqdm import tqdm

from convert.errors import UserError
from mlx_vlm_prune.loading import Processor, load
from mlx_vlm_prune.model import VLM
from mlx_vlm_prune.prompt import build
from mlx_vlm_prune.pruners import METHODS, Pipeline, Pruner, Stage, plan
from mlx_vlm_prune.scenes import CHECKPOINT, HELD_OUT_SEEDS, KINDS, Question, Scene, question_set
from mlx_vlm_prune.towers.between import Encoded

RESULTS = Path(__file__).parent / "results"
BATCH = 24
RESAMPLES = 2000
CHAINS = ("cls_attention+restore", "cls_attention+fastv", "visionzip+pyramiddrop", "tome+divprune")
Asked = list[tuple[Scene, Question]]


class RememberingTower:
    """A tower that encodes a batch of images once for all methods that work behind it."""

    def __init__(self, tower, want: dict[str, int | None]):
        self.tower, self.want = tower, want
        self.pixels: mx.array | None = None
        self.seen: Encoded | None = None

    def __call__(self, pixels: mx.array, want: dict, cuts: Sequence) -> Encoded:
        if cuts or not want.items() <= self.want.items():
            return self.tower(pixels, want, cuts)
        if self.pixels is not pixels:
            self.pixels, self.seen = pixels, self.tower(pixels, self.want)
        assert self.seen
        return self.seen


def batches(per_kind: int) -> Iterator[Asked]:
    """The held-out questions, BATCH at a time."""
    waiting: Asked = []
    for scene, questions in question_set(HELD_OUT_SEEDS, per_kind):
        waiting += [(scene, question) for question in questions]
        while len(waiting) >= BATCH:
            yield waiting[:BATCH]
            waiting = waiting[BATCH:]
    if waiting:
        yield waiting


class Batch:
    """Questions, made ready once for all methods."""

    def __init__(self, model: VLM, processor: Processor, asked: Asked):
        words = processor.tokenizer
        self.rows = [build(words, q.text, [model.N], processor.image_token) for _, q in asked]
        pixels = mx.array(np.stack([processor.image(scene.image()) for scene, _ in asked]))
        self.pixels = pixels.astype(model.dtype)
        answers = [words.encode(q.answer) for _, q in asked]
        end = min(words.eos_token_ids)
        A = max(map(len, answers)) + 1
        self.right_BA = np.array([[*ids, end, *[-1] * (A - 1 - len(ids))] for ids in answers])


def right(model: VLM, batch: Batch, pruner: Pruner | Pipeline, K: int) -> np.ndarray:
    """Which questions of a batch are answered rightly, (B,)."""
    before = model(batch.rows, batch.pixels, pruner, K)
    told_BA = mx.array(np.maximum(batch.right_BA[:, :-1], 0))
    logits_BAV = mx.concatenate(
        [before.logits_BLV[:, -1:], model.step(told_BA, before.next_B1, before)], axis=1
    )
    said_BA = np.array(mx.argmax(logits_BAV, axis=-1))
    return ((said_BA == batch.right_BA) | (batch.right_BA < 0)).all(axis=1)


def accuracy(
    model: VLM, processor: Processor, pruner: Pruner | Pipeline, K: int, per_kind: int
) -> dict[str, float]:
    """The share of right answers of each kind."""
    found: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    for asked in batches(per_kind):
        for (_, q), ok in zip(
            asked, right(model, Batch(model, processor, asked), pruner, K), strict=True
        ):
            found[q.kind].append(bool(ok))
    return {kind: sum(of) / per_kind for kind, of in found.items()}


def majority(per_kind: int) -> dict[str, float]:
    """The share of the most frequent answer of each kind."""
    given: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for _, questions in question_set(HELD_OUT_SEEDS, per_kind):
        for question in questions:
            given[question.kind][question.answer] += 1
    return {kind: max(given[kind].values()) / per_kind for kind in KINDS}


def possible(model: VLM, specs: Sequence[str], budgets: Sequence[int]) -> tuple[list, list[dict]]:
    """The pairs of method and budget that can be, and why the others cannot."""
    pairs, refused = [], []
    layers = model.config.text.num_hidden_layers
    for K in budgets:
        for spec in specs:
            try:
                chain = plan(spec, model.learned)
                step = chain.decoder
                if chain.trained_tokens not in (None, K):
                    raise UserError(f"{spec} was trained for {chain.trained_tokens} tokens")
                if step:
                    n = chain.budgets(model.N, K)[-2] if len(chain.steps) > 1 else model.N
                    step.ask(step.method.schedule, layers, n, K)
                pairs.append((spec, K))
            except UserError as e:
                refused.append({"pruner": spec, "tokens": K, "why": str(e)})
    return pairs, refused


def ask_all(
    model: VLM, processor: Processor, pairs: Sequence[tuple[str, int]], per_kind: int, kept: Path
) -> tuple[list[str], np.ndarray]:
    """Kinds of all questions, and who answered which rightly (pairs, questions)."""
    want: dict[str, int | None] = {}
    for spec, _ in pairs:
        want |= plan(spec, model.learned).want(model.config.vision.num_hidden_layers)
    model.tower = RememberingTower(model.tower, want)  # type: ignore[assignment]  # acts like one
    done = np.load(kept)["right"] if kept.exists() else np.zeros((len(pairs), 0), bool)
    kinds, total = [], per_kind * len(KINDS)
    bar = tqdm(total=total, initial=done.shape[1], desc="questions", file=sys.stderr)
    for n, asked in enumerate(batches(per_kind)):
        kinds += [question.kind for _, question in asked]
        if len(kinds) <= done.shape[1]:
            continue
        batch = Batch(model, processor, asked)
        new = np.array([right(model, batch, plan(spec, model.learned), K) for spec, K in pairs])
        done = np.concatenate([done, new], axis=1)
        if n % 10 == 9:
            np.savez_compressed(kept, right=done)
        bar.update(len(asked))
    return kinds, done


def difference(ours: np.ndarray, theirs: np.ndarray) -> list[float]:
    """Mean difference of two methods on the same questions, and its 95 % interval."""
    apart = ours.astype(np.float64) - theirs
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(apart), size=(RESAMPLES, len(apart)))
    low, high = np.quantile(apart[drawn].mean(axis=1), [0.025, 0.975])
    return [round(float(x), 4) for x in (apart.mean(), low, high)]


def table(pairs: Sequence[tuple[str, int]], kinds: list[str], done: np.ndarray) -> list[dict]:
    """One row a method and budget; `right` holds a bit a question, as hexadecimal digits."""
    of_kind = {kind: np.array([k == kind for k in kinds]) for kind in KINDS}
    random = {K: row for (spec, K), row in zip(pairs, done, strict=True) if spec == "random"}
    full = next(row for (spec, _), row in zip(pairs, done, strict=True) if spec == "none")
    rows = []
    for (spec, K), row in zip(pairs, done, strict=True):
        told = {kind: round(float(row[own].mean()), 4) for kind, own in of_kind.items()}
        rows.append({"pruner": spec, "tokens": K, "accuracy": told})
        rows[-1]["to_full"] = difference(row, full)
        if K in random and spec != "random":
            rows[-1]["to_random"] = difference(row, random[K])
        rows[-1]["right"] = np.packbits(row).tobytes().hex()
    return rows


def earlier(out: Path, per_kind: int, pairs: Sequence[tuple[str, int]], questions: int) -> dict:
    """What an earlier run found of other methods with the same questions."""
    if not out.exists():
        return {}
    told = json.loads(out.read_text(encoding="utf-8"))
    if told["per_kind"] != per_kind:
        return {}
    found = {}
    for row in told["rows"]:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(row["right"]), np.uint8))
        found[row["pruner"], row["tokens"]] = bits[:questions].astype(bool)
    return {pair: bits for pair, bits in found.items() if pair not in pairs}


def widened(model: VLM) -> None:
    """Quantized matrices as float32 of the same values: a CPU multiplies those much faster."""
    wide: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            how = {"group_size": module.group_size, "bits": module.bits}
            weight = mx.dequantize(module.weight, module.scales, module.biases, **how)
            is_linear = isinstance(module, nn.QuantizedLinear)
            new = nn.Linear(1, 1, bias=False) if is_linear else nn.Embedding(1, 1)
            new.weight = weight
            wide.append((path, new))
    model.update_modules(tree_unflatten(wide))


def earlier_refusals(out: Path, pairs: Sequence[tuple[str, int]], refused: list) -> list[dict]:
    """What an earlier run could not do, and this one was not asked for."""
    if not out.exists():
        return []
    told = json.loads(out.read_text(encoding="utf-8")).get("refused", [])
    now = {*pairs, *((row["pruner"], row["tokens"]) for row in refused)}
    return [row for row in told if (row["pruner"], row["tokens"]) not in now]


def weights(model: str | Path) -> int:
    """Bytes of a folder's model."""
    return sum(file.stat().st_size for file in Path(model).glob("model*.safetensors"))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--per-kind", type=int, default=334, help="questions of each kind")
    parser.add_argument("--pruner", action="append", help="repeat for several; default: all")
    parser.add_argument("--keep-tokens", type=int, action="append", help="default: 98, 49 and 22")
    parser.add_argument("--model", help="a folder (default: the built-in model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "scenes.json")
    args = parser.parse_args()
    model, processor = load(args.model)
    widened(model)
    untrained = [
        n for n, m in METHODS.items() if getattr(m, "learned", 0) and n not in model.learned
    ]
    left_out = {"none", *untrained}
    known = [n for n, m in METHODS.items() if m.stage is not Stage.ENHANCER and n not in left_out]
    specs = args.pruner or [*known, *CHAINS]
    pairs, refused = possible(model, specs, args.keep_tokens or (98, 49, 22))
    pairs = [("none", model.N), *pairs]
    told = json.dumps([pairs, args.per_kind]).encode()
    kept = args.out.with_suffix(f".{hashlib.sha256(told).hexdigest()[:8]}.npz")
    args.out.parent.mkdir(exist_ok=True)
    kinds, done = ask_all(model, processor, pairs, args.per_kind, kept)
    known_bits = earlier(args.out, args.per_kind, pairs, len(kinds))
    rows = table([*pairs, *known_bits], kinds, np.array([*done, *known_bits.values()]))
    for row in rows:
        shown = "  ".join(f"{kind} {v:.1%}" for kind, v in row["accuracy"].items())
        print(f"{row['pruner']:<24}{row['tokens']:>4}  {shown}", flush=True)
    about: dict = {"per_kind": args.per_kind, "majority": majority(args.per_kind), "rows": rows}
    about |= {"refused": refused + earlier_refusals(args.out, pairs, refused)}
    about |= {"megabytes": round(weights(args.model or CHECKPOINT) / 1e6, 2)}
    args.out.write_text(json.dumps(about, indent=4) + "\n", encoding="utf-8")
    kept.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
