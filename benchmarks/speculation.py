"""What drafting with a twig costs and gains: `python -m benchmarks.speculation`.

The cost of drafting does not depend on training. It is measured on a shape with random weights, for
two twigs: every draft of `right` is accepted (the layers after the branch output zeros in model and
twig, and both have the same head), and none of `wrong` (the rows of its head are shifted by one). A
prompt is prefilled once. Then four modes decode the same number of tokens and alternate in one
process: `full` with all visual tokens, `pruned` as TwigVLM prunes, and pruned with either twig,
always with the full number of drafts.

The acceptance rate does depend on training. It is measured with the built-in model's trained twig
on held-out questions, whose answers are a few tokens. `--save` writes
benchmarks/results/speculation.json, from which the table of claims is made. With `--model`
the acceptance rate of a twig of your own is measured instead, without the cost.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.generate import generate
from mlx_vlm_prune.generation.speculation import Speculation
from mlx_vlm_prune.generation.steps import greedy
from mlx_vlm_prune.hosts.loading import load
from mlx_vlm_prune.inputs.budget import tokens_for
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import Gain, alternate, spread, times_text
from mlx_vlm_prune.models.language.mlx_lm import MlxLm
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.models.layers import TwigReader
from mlx_vlm_prune.models.vlm import VLM, Prefill
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, question_set

from . import backend_mlx
from .command_line import parser, positive, run_command
from .model_shapes import SHAPES, request, shape

LAYER, LAYERS = 1, 1  # of 8: about the paper's 2 and 3 of 32
SHARE = 1 / 3  # of the visual tokens stay in the average layer: TwigVLM's 192 of 576
MODES = ("full", "pruned", "right", "wrong")
SCENES: dict[str, dict[str, Any]] = {  # how the built-in model answers
    "full": {},
    "pruned": {"pruner": "twig", "keep_ratio": 0.5},
    "drafted": {"pruner": "twig", "keep_ratio": 0.5},
}


@dataclass(frozen=True)
class Decoded:
    """The tokens after a prompt, and how many drafts were made and accepted."""

    ids: list[int]
    ms: float  # of a token, on average
    drafted: int = 0
    accepted: int = 0


def zero_outputs(layers: Sequence[Any]) -> None:
    """Let layers add zeros to the hidden states; their time does not change."""
    for layer in layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight = mx.zeros_like(out.weight)


def right_and_wrong_twigs(model: VLM) -> tuple[Twig, Twig]:
    """A twig with the model's logits, and one with the logits shifted by a token. Changes `model`.

    Raises UserError if the language model is mlx-lm's.
    """
    language = model.language
    if isinstance(language, MlxLm):
        raise UserError("a twig does not grow on a language model of mlx-lm's")
    twigs = Twig(language.config, LAYERS, LAYER), Twig(language.config, LAYERS, LAYER)
    head_VD = language.lm_head.weight if "lm_head" in language else language.embed_tokens.weight
    zero_outputs(language.layers[LAYER:])
    zero_outputs(twigs[0].layers)
    for twig, shift in zip(twigs, (0, 1), strict=True):
        twig.layers = twigs[0].layers
        twig.norm.weight, twig.head.weight = language.norm.weight, mx.roll(head_VD, shift, 0)
        twig.set_dtype(model.dtype)
        mx.eval(twig.parameters())
    return twigs


class PrefilledPrompt:
    """A prompt after the prefill, with all visual tokens and pruned, and the twigs' caches."""

    def __init__(self, name: str, tokens: int, drafts: int):
        config = shape(name)
        self.stack, self.tokens, self.drafts = backend_mlx.Stack(config, "float32"), tokens, drafts
        self.model, inputs = self.stack.model, request(config)
        pixels = mx.array(inputs.pixels_IHW3()).astype(self.model.dtype)
        right, wrong = right_and_wrong_twigs(self.model)
        self.readers = {"right": TwigReader(right), "wrong": TwigReader(wrong)}
        self.K = tokens_for(self.model.N, SHARE)
        pipeline = plan("twig", {"twig": right})
        prefill = partial(self.model, inputs.rows, pixels)
        self.full = prefill(plan("none"), self.model.N)
        self.pruned = prefill(pipeline, self.K, twig=self.readers["right"])
        self.readers["wrong"].cache = self.readers["right"].cache  # their layers are the same

    def decode(self, mode: str) -> Decoded:
        """Decode after the prompt in a mode; the next call starts after the prompt again."""
        prefill = (self.full if mode == "full" else self.pruned).fork()
        reader = self.readers.get(mode)
        first_11 = greedy(prefill.logits_BV)
        if reader is None:
            (ids,), ms = self.stack.decode(prefill, first_11, self.tokens)
            return Decoded(ids, ms)
        rows = [layer.rows for layer in reader.cache]
        decoded = self._decode_with_drafts(prefill, reader, first_11)
        for layer, n in zip(reader.cache, rows, strict=True):
            layer.rewind(n)
        return decoded

    def _decode_with_drafts(
        self, prefill: Prefill, reader: TwigReader, first_11: mx.array
    ) -> Decoded:
        turns = Speculation(prefill, reader, (), self.drafts, min_probability=0.0)
        began = time.perf_counter()
        first, limit = int(np.array(first_11)[0, 0]), self.tokens + 1
        tokens = turns.tokens(first, limit + self.drafts)  # the last turn has all drafts, too
        steps = [*islice(tokens, limit)]
        ms = 1000 * (time.perf_counter() - began) / self.tokens
        ids, last = [step.id for step in steps], steps[-1]
        return Decoded(ids, ms, last.drafted or 0, last.accepted or 0)


def measure_cost(args: argparse.Namespace) -> dict[str, Any]:
    """On a shape: milliseconds of a token in every mode, and the gains of drafting."""
    prompt = PrefilledPrompt(args.shape, args.tokens, args.drafts)
    decoders: list[Callable[[], Decoded]] = [partial(prompt.decode, mode) for mode in MODES]
    runs: dict[str, list[Decoded]] = {mode: [] for mode in MODES}
    turns = (args.runs, 1, len(decoders) - 1, "drafting")
    for i, decoded, full in alternate(decoders[0], decoders[1:], *turns):
        runs[MODES[i + 1]].append(decoded)
        if not i:
            runs["full"].append(full)
    ms = {mode: [decoded.ms for decoded in mode_runs] for mode, mode_runs in runs.items()}
    last = {mode: mode_runs[-1] for mode, mode_runs in runs.items()}
    token_ms, turn_ms = spread(ms["pruned"])["median"], spread(ms["wrong"])["median"]
    return {
        "shape": args.shape, "tokens": args.tokens, "drafts": args.drafts, "kept": prompt.K,
        "twig": {"layer": LAYER, "layers": LAYERS, "of": len(prompt.model.language.layers)},
        "ms": {mode: spread(times) for mode, times in ms.items()},
        "gain": gains(ms, ("right", "wrong")),
        "pays_from": turn_ms / token_ms - 1,  # accepted drafts of a turn from which on it is faster
        "same": last["pruned"].ids == last["right"].ids == last["wrong"].ids,
        "drafts_right": {m: [last[m].accepted, last[m].drafted] for m in ("right", "wrong")},
    }  # fmt: skip


def gains(ms: dict[str, list[float]], modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each mode's gain over full, and over the same pruning without drafts."""
    return {
        mode: {
            baseline: {**asdict(gain := Gain.of(ms[baseline], ms[mode])), "median": gain.reported}
            for baseline in ("full", "pruned")
        }
        for mode in modes
    }


def measure_scenes(args: argparse.Namespace) -> dict[str, Any]:
    """A model of scenes: accepted drafts, and the milliseconds of tokens after the first."""
    model, processor = load(args.model)
    ms: dict[str, list[float]] = {mode: [] for mode in SCENES}
    drafted = accepted = questions = same = 0
    for scene, scene_questions in question_set(HELD_OUT_SEEDS, args.per_kind):
        for question in scene_questions:
            answers = {}
            for mode, options in SCENES.items():
                drafts = args.drafts if mode == "drafted" else None
                answers[mode] = generate(model, processor, question.text, scene.image(),
                                         num_draft_tokens=drafts, **options)  # fmt: skip
            answer = answers["drafted"]
            drafted += answer.drafted or 0
            accepted += answer.accepted or 0
            questions += 1
            same += answer.token_ids == answers["pruned"].token_ids
            if all(answer.generation_tokens > 1 for answer in answers.values()):
                for mode, answer in answers.items():
                    ms[mode].append(1000 / answer.generation_tps)
    return {
        "questions": questions, "same": same, "drafted": drafted, "accepted": accepted,
        "ms": {mode: spread(times) for mode, times in ms.items()},
        "gain": gains(ms, ("drafted",)),
    }  # fmt: skip


def summary(result: dict[str, Any]) -> str:
    """The cell of the table of claims: gains over full, with no draft right and with all."""
    medians = [result["cost"]["gain"][mode]["full"]["median"] for mode in ("wrong", "right")]
    low, high = map(times_text, medians)
    share = result["scenes"]["accepted"] / max(1, result["scenes"]["drafted"])
    return f"{low} to {high} (token; none to all of the drafts right, on scenes {share:.0%})"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print the cost, of the built-in model's twig alone, and the acceptance."""
    result: dict[str, Any] = {} if args.model else {"cost": measure_cost(args)}
    if cost := result.get("cost"):
        for mode in MODES:
            ms = cost["ms"][mode]["median"]
            print(f"{cost['shape']}, {mode}: {ms:.1f} ms a token", flush=True)
        print(f"  a turn of {cost['drafts']} drafts pays where {cost['pays_from']:.1f} are right")
    scenes = result["scenes"] = measure_scenes(args)
    print(f"scenes: {scenes['accepted']} of {scenes['drafted']} drafts right, {scenes['same']} of"
          f" {scenes['questions']} answers the same")  # fmt: skip
    if cost:
        print(f"beside the model with all visual tokens: {summary(result)}")
    return {
        "benchmark": "speculation", "model": args.model, "device": backend_mlx.device(),
        "runs": args.runs, **result, "machine": describe_machine(), "versions": versions(),
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("speculation", __doc__)
    add = p.add_argument
    add("--shape", default="llava-8", help=f"{', '.join(SHAPES)} (default: llava-8)")
    add("--drafts", type=positive, default=5, help="drafted tokens a turn; 5 in the paper")
    add("--tokens", type=positive, default=12, help="new tokens after the first")
    add("--runs", type=positive, default=5, help="measured runs of each mode")
    add("--per-kind", type=positive, default=12, help="scenes questions of each kind")
    add(
        "--model",
        metavar="FOLDER",
        help="a model of scenes with a twig (default: the built-in one)",
    )
    args = p.parse_args(argv)
    if args.model and args.save:
        p.error("--save keeps the built-in model's figures; leave out --model")
    return args


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
