"""What drafting with a twig costs and gains: `python -m benchmarks.speculation`.

How often a draft is right depends on training, what it costs does not. So the cost is measured on
a shape with random weights, at both ends: with a twig whose every draft is right (the layers from
it on add nothing, neither the model's nor its own, and both say words alike), and with one whose
every draft is wrong (its words are one place off). A prompt is read once, then all say so many
tokens after it, whatever they are, in turns in one process: the model with all visual tokens, the
same pruned as TwigVLM prunes, and that with either twig, whose drafts are always full.

How often a trained twig is right is told by the built-in model's, on questions it never saw;
answers are a word or few there, and end. Writes benchmarks/results/speculation.json with
`--save`; the claims' table of the README is made from it.
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
from mlx_vlm_prune.machine.hardware import machine, versions
from mlx_vlm_prune.models.decoder import TwigReader
from mlx_vlm_prune.models.language.mlx_lm import MlxLm
from mlx_vlm_prune.models.language.twig import Twig
from mlx_vlm_prune.models.vlm import VLM, Prefill
from mlx_vlm_prune.pruners import plan
from mlx_vlm_prune.pruners.budget import tokens_for
from mlx_vlm_prune.scenes import HELD_OUT_SEEDS, question_set

from . import backend_mlx
from .command_line import finish, parser, positive
from .model_shapes import SHAPES, request, shape
from .timing import Gain, alternate, spread, times

LAYER, LAYERS = 1, 1  # of 8, as near to the paper's 2 and 3 of 32 as whole layers come
SHARE = 1 / 3  # of the visual tokens stay in the average layer: TwigVLM's 192 of 576
MODES = ("full", "pruned", "right", "wrong")
SCENES: dict[str, dict[str, Any]] = {  # how the built-in model answers
    "full": {},
    "pruned": {"pruner": "twig", "keep_ratio": 0.5},
    "drafted": {"pruner": "twig", "keep_ratio": 0.5},
}


@dataclass(frozen=True)
class Said:
    """So many tokens after a prompt, and how many of them were drafts."""

    ids: list[int]
    ms: float  # of a token, on average
    drafted: int = 0
    accepted: int = 0


def silence(layers: Sequence[Any]) -> None:
    """Layers that add nothing, and take as long as any."""
    for layer in layers:
        for out in (layer.self_attn.o_proj, layer.mlp.down_proj):
            out.weight = mx.zeros_like(out.weight)


def both_ends(model: VLM) -> tuple[Twig, Twig]:
    """A twig that says what the model says, which is changed for it, and one that never does."""
    language = model.language
    if isinstance(language, MlxLm):
        raise UserError("a twig does not grow on a language model of mlx-lm's")
    twigs = Twig(language.config, LAYERS, LAYER), Twig(language.config, LAYERS, LAYER)
    words_VD = language.lm_head.weight if "lm_head" in language else language.embed_tokens.weight
    silence(language.layers[LAYER:])
    silence(twigs[0].layers)
    for twig, off in zip(twigs, (0, 1), strict=True):
        twig.layers = twigs[0].layers
        twig.norm.weight, twig.head.weight = language.norm.weight, mx.roll(words_VD, off, 0)
        twig.set_dtype(model.dtype)
        mx.eval(twig.parameters())
    return twigs


class Desk:
    """A prompt that was read with all visual tokens, and pruned with either twig reading along."""

    def __init__(self, name: str, tokens: int, drafts: int):
        config = shape(name)
        self.stack, self.tokens, self.drafts = backend_mlx.Stack(config, "float32"), tokens, drafts
        self.model, asked = self.stack.model, request(config)
        pixels = mx.array(asked.pixels_IHW3()).astype(self.model.dtype)
        right, wrong = both_ends(self.model)
        self.readers = {"right": TwigReader(right), "wrong": TwigReader(wrong)}
        self.K = tokens_for(self.model.N, SHARE)
        pipeline = plan("twig", {"twig": right})
        read = partial(self.model, asked.rows, pixels)
        self.full = read(plan("none"), self.model.N)
        self.pruned = read(pipeline, self.K, twig=self.readers["right"])
        self.readers["wrong"].cache = self.readers["right"].cache  # of the same layers

    def say(self, mode: str) -> Said:
        """From behind the prompt again."""
        prefill = (self.full if mode == "full" else self.pruned).fork()
        reader = self.readers.get(mode)
        first_11 = greedy(prefill.logits_BV)
        if reader is None:
            (ids,), ms = self.stack.say(prefill, first_11, self.tokens)
            return Said(ids, ms)
        rows = [layer.rows for layer in reader.cache]
        answer = self._drafted(prefill, reader, first_11)
        for layer, n in zip(reader.cache, rows, strict=True):
            layer.rewind(n)
        return answer

    def _drafted(self, prefill: Prefill, reader: TwigReader, first_11: mx.array) -> Said:
        turns = Speculation(prefill, reader, (), self.drafts, sure=0.0)
        began = time.perf_counter()
        first, limit = int(np.array(first_11)[0, 0]), self.tokens + 1
        tokens = turns.tokens(first, limit + self.drafts)  # so that the last draft is full, too
        told = [*islice(tokens, limit)]
        ms = 1000 * (time.perf_counter() - began) / self.tokens
        return Said([one.id for one in told], ms, told[-1].drafted or 0, told[-1].accepted or 0)


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """On a shape: milliseconds of a token in every mode, and how many times as fast as plain."""
    desk = Desk(args.shape, args.tokens, args.drafts)
    says: list[Callable[[], Said]] = [partial(desk.say, mode) for mode in MODES]
    found: dict[str, list[Said]] = {mode: [] for mode in MODES}
    for i, one, before in alternate(says[0], says[1:], args.runs, 1, len(says) - 1, "drafting"):
        found[MODES[i + 1]].append(one)
        if not i:
            found["full"].append(before)
    ms = {mode: [one.ms for one in several] for mode, several in found.items()}
    last = {mode: several[-1] for mode, several in found.items()}
    plain, turn = spread(ms["pruned"])["median"], spread(ms["wrong"])["median"]
    return {
        "shape": args.shape, "tokens": args.tokens, "drafts": args.drafts, "kept": desk.K,
        "twig": {"layer": LAYER, "layers": LAYERS, "of": len(desk.model.language.layers)},
        "ms": {mode: spread(several) for mode, several in ms.items()},
        "gain": gains(ms, ("right", "wrong")),
        "pays_from": turn / plain - 1,  # drafts of a turn that must be right
        "same": last["pruned"].ids == last["right"].ids == last["wrong"].ids,
        "drafts_right": {m: [last[m].accepted, last[m].drafted] for m in ("right", "wrong")},
    }  # fmt: skip


def gains(ms: dict[str, list[float]], modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each mode beside full, and beside the same pruning without drafts."""
    return {
        mode: {
            plain: {**asdict(gain := Gain.of(ms[plain], ms[mode])), "median": gain.told}
            for plain in ("full", "pruned")
        }
        for mode in modes
    }


def scenes(args: argparse.Namespace) -> dict[str, Any]:
    """The built-in model: how many drafts are right, and what the words after the first take."""
    model, processor = load()
    ms: dict[str, list[float]] = {mode: [] for mode in SCENES}
    drafted = accepted = asked = same = 0
    for scene, several in question_set(HELD_OUT_SEEDS, args.per_kind):
        for question in several:
            answers = {}
            for mode, options in SCENES.items():
                drafts = args.drafts if mode == "drafted" else None
                answers[mode] = generate(model, processor, question.text, scene.image(),
                                         num_draft_tokens=drafts, **options)  # fmt: skip
            one = answers["drafted"]
            drafted, accepted = drafted + (one.drafted or 0), accepted + (one.accepted or 0)
            asked, same = asked + 1, same + (one.token_ids == answers["pruned"].token_ids)
            if all(answer.generation_tokens > 1 for answer in answers.values()):
                for mode, answer in answers.items():
                    ms[mode].append(1000 / answer.generation_tps)
    return {
        "questions": asked, "same": same, "drafted": drafted, "accepted": accepted,
        "ms": {mode: spread(several) for mode, several in ms.items()},
        "gain": gains(ms, ("drafted",)),
    }  # fmt: skip


def summary(found: dict[str, Any]) -> str:
    """What stands in the claims' table: beside full, from no draft right to all of them."""
    ends = [found["cost"]["gain"][mode]["full"]["median"] for mode in ("wrong", "right")]
    low, high = map(times, ends)
    share = found["scenes"]["accepted"] / max(1, found["scenes"]["drafted"])
    return f"{low} to {high} (token; none to all of the drafts right, on scenes {share:.0%})"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Both, and a few lines of them."""
    found: dict[str, Any] = {"cost": cost(args)}
    one = found["cost"]
    for mode in MODES:
        print(f"{one['shape']}, {mode}: {one['ms'][mode]['median']:.1f} ms a token", flush=True)
    print(f"  a turn of {one['drafts']} drafts pays where {one['pays_from']:.1f} are right")
    found["scenes"] = scenes(args)
    two = found["scenes"]
    print(f"scenes: {two['accepted']} of {two['drafted']} drafts right, {two['same']} of"
          f" {two['questions']} answers the same")  # fmt: skip
    print(f"beside the model with all visual tokens: {summary(found)}")
    return {
        "benchmark": "speculation", "device": backend_mlx.device(), "runs": args.runs, **found,
        "machine": machine(), "versions": versions(),
    }  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("speculation", __doc__)
    add = p.add_argument
    add("--shape", default="llava-8", help=f"{', '.join(SHAPES)} (default: llava-8)")
    add("--drafts", type=positive, default=5, help="of a turn (default: the paper's 5)")
    add("--tokens", type=positive, default=12, help="after the first (default: 12)")
    add("--runs", type=positive, default=5, help="measured runs of each mode (default: 5)")
    add("--per-kind", type=positive, default=12, help="scenes: questions a kind (default: 12)")
    return p.parse_args(argv)


main = partial(finish, parse, run)


if __name__ == "__main__":
    main()
