"""Does pruning pay, for this model on this machine? `mlx-vlm-prune advise` measures it.

Where the time goes is measured, what each stage could win follows from that and from the operation
counts, and which methods stand on the frontier the last evaluation of this model says.

Shapes: B prompts (1 here), L tokens, V words.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .checkpoints.command_line import Parser, in_one_sentence
from .checkpoints.errors import UserError
from .checkpoints.reading.files import check_target, read_json, write_atomically
from .evaluation.bootstrap import FEWEST
from .generation.steps import generate_step, greedy
from .generation.stream import PreparedPrompt, prepare
from .hosts.loading import load
from .machine.hardware import describe_machine, versions
from .machine.user_cache import cache_folder, model_key
from .models.loading import DTYPES, Processor
from .models.vlm import VLM
from .planning import operations
from .planning.calibration import calibrate
from .pruners import plan
from .scenes import compose

SAMPLE_SEED, PROMPT, TOKENS = 1_000_000_007, "What is this?", 16
BEHIND, INSIDE, SMALLER = "random", "tome", "downsample"  # of each stage, what costs least to run
WORTH, SAFE = 1.1, 0.02  # a gain worth having; a loss of accuracy that nobody minds
EVALUATE = "python -m mlx_vlm_prune.evaluate"
DESCRIPTION = "Measure whether pruning pays, for a model on this machine, and recommend a method."


@dataclass(frozen=True)
class Times:
    """Milliseconds of a warm request with all tokens, and what may be had with a quarter.

    `first` of each stage is the predicted time to the first token when a quarter stays there.
    """

    image: float
    vision: float
    prefill: float
    token: float
    first: dict[str, float]

    @property
    def total(self) -> float:
        return self.image + self.vision + self.prefill

    @property
    def most(self) -> float:
        """The most that any method behind the tower can win, were it to leave nothing."""
        return self.total / (self.image + self.vision)


@dataclass(frozen=True)
class Advice:
    """What was found; `lines` says it to a person."""

    model: str
    tokens: int
    kept: int
    times: Times
    cache_bytes: tuple[int, int]  # full, and with `kept` tokens
    frontier: list[dict[str, Any]] = field(default_factory=list)
    questions: str = ""
    count: int = 0  # of the questions
    full: float = 1.0  # what the model with all tokens got in them

    @property
    def lines(self) -> list[str]:
        t, full, few = self.times, *(n / 1e6 for n in self.cache_bytes)
        share = {name: getattr(t, name) / t.total for name in ("image", "vision", "prefill")}
        gains = {stage: t.total / ms for stage, ms in t.first.items()}
        return [
            f"{self.model} on this machine: the first token after {t.total:.0f} ms, then one every "
            f"{t.token:.1f} ms, with all {self.tokens} visual tokens of an image.",
            f"Of the time to the first token, opening the image takes {share['image']:.0%}, the "
            f"vision tower {share['vision']:.0%}, projector and prompt {share['prefill']:.0%}.",
            f"Behind the tower no method can win more than {t.most:.2f} x, even if nothing were "
            f"left; with {self.kept} tokens {gains['behind']:.2f} x is to be expected.",
            f"Inside the tower ({INSIDE}) the operation count lets expect {gains['inside']:.2f} x, "
            f"of a smaller image ({SMALLER}) {gains['smaller']:.2f} x, with {self.kept} tokens.",
            f"The cache of the prompt: {full:.1f} MB, with {self.kept} tokens {few:.1f} MB.",
            *self._frontier_lines(),
            self.recommendation,
        ]

    def _frontier_lines(self) -> list[str]:
        if not self.frontier:
            return [f"What it costs in answers is not known: run {EVALUATE}{self._model}"]
        losses = [100 * row["to_full"]["overall"][0] for row in self.frontier]
        told = "; ".join(
            f"{row['pruner']} with {row['tokens']} ({loss:+.1f} points)"
            for row, loss in zip(self.frontier, losses, strict=True)
        )
        return [f"On the frontier of the last evaluation ({self.questions}, {self.count}): {told}."]

    @property
    def _model(self) -> str:
        return "" if self.model == "scenes" else f" --model {self.model}"

    @property
    def recommendation(self) -> str:
        """One command to copy, or not to prune."""
        gain = self.times.total / min(self.times.first.values())
        if gain < WORTH:
            return f"Advice: do not prune; at best it would be {gain:.2f} x as fast here."
        safe = [row for row in self.frontier if self._is_safe(row)]
        start = f"python -m mlx_vlm_prune.generate{self._model} --image photo.jpg --prompt '…'"
        if not self.frontier:
            return f"Advice: evaluate first; then {start} --pruner … --keep-ratio 0.25"
        if self.count < FEWEST or self.full <= 0:
            few = f"only {self.count} questions" if self.count < FEWEST else "no right answer"
            return f"Advice: evaluate again; with {few} the last one says nothing."
        if not safe:
            return (
                f"Advice: do not prune; every method may lose more than {SAFE:.0%} of the answers"
                " (95 % interval) at the budgets that were evaluated."
            )
        best = min(safe, key=lambda row: row["tokens"])
        return f"Advice: {start} --pruner {best['pruner']} --keep-tokens {best['tokens']}"

    @staticmethod
    def _is_safe(row: Mapping[str, Any]) -> bool:
        """Does it lose no more than SAFE, as far as the interval tells?"""
        low = row["to_full"]["overall"][1]
        return low is not None and low >= -SAFE


def frontier(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows than which none is better with as few tokens, nor as good with fewer; most tokens
    first. Full is not among them."""
    pruned = [row for row in rows if row["pruner"] != "none" and row["tokens"] < row["of"]]
    best: list[Mapping[str, Any]] = []
    for row in sorted(pruned, key=lambda row: (row["tokens"], -row["overall"])):
        if not best or row["overall"] > best[-1]["overall"]:
            best.append(row)
    return best[::-1]


def evaluation(folder: Path | None, named: Path | None) -> dict[str, Any]:
    """The evaluation that was named, else the last one of this model, else nothing.

    Raises UserError for a named file that is none.
    """
    path = named or (folder and cache_folder() / "evaluations" / f"{model_key(folder)}.json")
    if not path or (named is None and not path.is_file()):
        return {}
    try:
        told = read_json(path)
        for row in told["rows"]:
            row["pruner"], row["tokens"] + row["of"], row["overall"] + row["to_full"]["overall"][0]
            row["to_full"]["overall"][1]
    except (KeyError, TypeError, IndexError) as e:
        raise UserError(f"{path} is no evaluation ({e}); {EVALUATE} writes one") from None
    return told


def measured(model: VLM, processor: Processor, image: Any, K: int) -> Times:
    """A calibration, kept for budgets too, and what follows from it."""
    asked = prepare(model, processor, PROMPT, image)
    known = calibrate(model, processor.folder, plan(BEHIND), asked)
    N, parts = model.N, known.ms(model.N, asked.text, 1)
    began = time.perf_counter()
    mx.eval(prepare(model, processor, PROMPT, image).pixels)
    opened, few = 1000 * (time.perf_counter() - began), known.ms(K, asked.text, 1)
    whole, smaller = (
        operations.count(model.config, asked.text, plan(name), k).vision
        for name, k in (("none", N), (SMALLER, K))
    )
    inside = whole
    if model.merge == (1, 1):
        inside = operations.count(model.config, asked.text, plan(INSIDE), K).vision
    first = {
        "behind": opened + sum(few.values()),
        "inside": opened + parts["vision"] * inside / whole + few["prefill"],
        "smaller": opened + parts["vision"] * smaller / whole + few["prefill"],
    }
    return Times(opened, parts["vision"], parts["prefill"], new_token(model, asked), first)


def new_token(model: VLM, asked: PreparedPrompt) -> float:
    """Milliseconds, the mean of TOKENS after the prompt; none of them ends it."""
    prefill = model([asked.prompt], asked.pixels, plan("none"), model.N)
    first_B1 = greedy(prefill.logits_BV)
    mx.eval(first_B1)
    start = time.perf_counter()
    for token_B1 in generate_step(prefill, first_B1, greedy, TOKENS + 1):
        mx.eval(token_B1)
    return 1000 * (time.perf_counter() - start) / TOKENS


def advise(model: VLM, processor: Processor, image: Any, told: Mapping[str, Any]) -> Advice:
    """Measure, which takes some seconds and shows progress, and compare."""
    N = model.N
    K = max(1, N // 4)
    text = prepare(model, processor, PROMPT, image).text
    held = [
        operations.count(model.config, text, plan(name), k, itemsize=model.dtype.size).cache_bytes
        for name, k in (("none", N), (BEHIND, K))
    ]
    rows = [
        {name: row[name] for name in ("pruner", "tokens", "of", "overall", "to_full")}
        for row in frontier(told.get("rows", ()))
    ]
    times = measured(model, processor, image, K)
    full = [row["overall"] for row in told.get("rows", ()) if row["pruner"] == "none"]
    return Advice(
        processor.name, N, K, times, (held[0], held[1]), rows, str(told.get("questions", "")),
        int(told.get("count", 0)), max(full, default=0.0),
    )  # fmt: skip


# fmt: off
def build_parser() -> Parser:
    """The command line of `advise`."""
    parser = Parser("mlx_vlm_prune.advise", description=DESCRIPTION)
    add = parser.add_argument
    add("--model", help="folder or Hugging Face name (default: the built-in scenes model)")
    add("--dtype", choices=("auto", *DTYPES), default="auto",
        help="of the weights and the computation; auto is float32 on a CPU, the checkpoint's own"
        " on a GPU")
    add("--image", metavar="FILE", help="an image like those it will get (default: a drawn scene)")
    add("--evaluation", type=Path, metavar="FILE.json",
        help="a result of `evaluate` (default: the last one of this model)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    return parser
# fmt: on


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; a user's mistake ends in one sentence and exit code 2."""
    parser = build_parser()
    with in_one_sentence(parser):
        run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Load, measure and say."""
    if args.json:
        check_target(args.json, replace=True)
    model, processor = load(args.model, dtype=args.dtype)
    if not isinstance(model, VLM):
        raise UserError("advice is for models of ours; mlx-vlm's are not measured yet")
    told = evaluation(processor.folder, args.evaluation)
    advice = advise(model, processor, args.image or compose(SAMPLE_SEED).image(), told)
    print("\n".join(advice.lines))
    if args.json:
        figures = {**asdict(advice), "machine": describe_machine(), "versions": versions()}
        write_atomically(args.json, json.dumps(figures, indent=4, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
