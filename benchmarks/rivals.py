"""Are we as fast as what one would take instead? `python -m benchmarks.rivals`.

Nothing is pruned on either side: what pruning gains counts for little where the same model runs
faster elsewhere. `transformers`: the reference, torch_ref, beside CLIPVisionModel or
SiglipVisionModel with LlamaForCausalLM or Qwen3ForCausalLM (sdpa), from a picture's pixels to the
first token, and per new token. `mlx-lm`: our language model on MLX beside mlx-lm's llama or qwen3,
reading as many rows as such a prompt has, and per new token. Both sides keep a cache, score only
the last row of a prompt, and begin a token before the one before it is handed over.

Both have the same random weights and take turns in one process, warm; before, their logits must
be equal to 0.001 of the largest. A ratio, theirs ÷ ours, is not told where it spreads by more
than it differs from 1 (benchmarks/timing.py). The last line is one JSON object of all figures.

A smaller picture, the rival of every method, is one of them: it is measured beside others by
`python -m benchmarks.speed --pruner downsample --pruner cls_attention --pruner tome`.

Shapes: B prompts (1 here), L rows, D features, V words.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata, util
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_vlm_prune.checkpoints.config import MiniMindConfig, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import machine, versions
from mlx_vlm_prune.models.cache import LayerCache
from mlx_vlm_prune.models.language.minimind import MiniMind

from .backend_mlx import device
from .command_line import finish, natural, parser, positive
from .model_shapes import SHAPES, TEXT_TOKENS, shape
from .timing import NOT_TOLD, Gain, alternate, spread

RTOL = 1e-3  # of the largest logit
CHECKED = 4  # new tokens whose logits are compared, read with caches


class Side(Protocol):
    """An implementation and its prompt."""

    def every_row(self) -> np.ndarray:
        """Logits (L, V) of the whole prompt, without a cache."""

    def read(self) -> tuple[Any, Any]:
        """Logits (1, V) after the prompt, and a cache that was empty before."""

    def step(self, token: Any, cache: Any) -> Any:
        """Logits (1, V) after one more token; the cache grows by it."""


@dataclass(frozen=True)
class Pair:
    """Two sides with the same weights; `likeliest` begins to compute the next token."""

    ours: Side
    theirs: Side
    likeliest: Callable[[Any], Any]
    first: str  # what is timed up to the first token
    device: str


@dataclass
class Reading:
    """What our language model continues from: its cache, and where the next row stands."""

    cache: list[LayerCache]
    place: int


class OurLanguage:
    """Ours, as `VLM` calls it for a prompt without padding."""

    def __init__(self, model: MiniMind, embeds_1LD: mx.array):
        self.model, self.embeds_1LD = model, embeds_1LD

    def every_row(self) -> np.ndarray:
        return np.array(
            self.model.logits(self._run(self.embeds_1LD, 0, self.model.make_cache()))[0]
        )

    def read(self) -> tuple[mx.array, Reading]:
        cache = self.model.make_cache()
        x_1LD = self._run(self.embeds_1LD, 0, cache)
        return self.model.logits(x_1LD[:, -1]), Reading(cache, self.embeds_1LD.shape[1])

    def step(self, token_1: mx.array, held: Reading) -> mx.array:
        x_11D = self._run(self.model.embed_tokens(token_1[None]), held.place, held.cache)
        held.place += 1
        return self.model.logits(x_11D[:, -1])

    def _run(self, x_1LD: mx.array, start: int, cache: list[LayerCache]) -> mx.array:
        """Hidden states of rows from a place on, through all layers."""
        places_1L = start + mx.arange(x_1LD.shape[1])[None]
        return self.model.run(range(self.model.depth), x_1LD, places_1L, cache)


class TheirLanguage:
    """mlx-lm's, given embeddings."""

    def __init__(self, model: MiniMind, embeds_1LD: mx.array):
        family = import_module(f"mlx_lm.models.{'qwen3' if model.config.qk_norm else 'llama'}")
        self.caches = import_module("mlx_lm.models.cache").make_prompt_cache
        sizes = {**asdict(model.config), "head_dim": model.config.head_dim}
        told = {**sizes, "model_type": family.__name__, "tie_word_embeddings": True}
        self.model = family.Model(family.ModelArgs.from_dict(told))
        held: Any = tree_flatten(model.parameters())
        self.model.load_weights([(f"model.{name}", weight + 0) for name, weight in held])
        mx.eval(self.model.parameters())
        self.embeds_1LD = embeds_1LD

    def every_row(self) -> np.ndarray:
        return np.array(self.model(None, input_embeddings=self.embeds_1LD)[0])

    def read(self) -> tuple[mx.array, Any]:
        cache = self.caches(self.model)
        # Their model scores every row of a prompt; past its head, only the last.
        hidden_1LD = self.model.model(None, cache, input_embeddings=self.embeds_1LD)
        return self.model.model.embed_tokens.as_linear(hidden_1LD[:, -1]), cache

    def step(self, token_1: mx.array, cache: Any) -> mx.array:
        return self.model(token_1[None], cache=cache)[:, -1]


def pair_mlx_lm(config: VLMConfig) -> Pair:
    """The language models, and as many random rows as a prompt of the shape has."""
    mx.random.seed(0)
    assert isinstance(config.text, MiniMindConfig)
    model = MiniMind(config.text)
    # Norms of one, as they are made, would hide that one is another's.
    model.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape) * (w.ndim == 1),
                          model.parameters()))  # fmt: skip
    embeds_1LD = mx.random.normal((1, config.N + TEXT_TOKENS, config.text.hidden_size))
    mx.eval(model.parameters(), embeds_1LD)

    def likeliest(logits_1V: mx.array) -> mx.array:
        token_1 = mx.argmax(logits_1V, axis=-1)
        mx.async_eval(token_1)
        return token_1

    ours, theirs = OurLanguage(model, embeds_1LD), TheirLanguage(model, embeds_1LD)
    return Pair(ours, theirs, likeliest, "prefill", f"mlx on {device()}")


def pair_transformers(config: VLMConfig) -> Pair:
    """The whole stacks."""
    from . import backend_torch
    from . import rival_transformers as both

    where = f"torch on {backend_torch.device()}"
    return Pair(*both.sides(config), both.likeliest, "first token", where)


@dataclass(frozen=True)
class Rival:
    """How to put ours beside theirs, on which shapes, and what must be installed for it."""

    pair: Callable[[VLMConfig], Pair]
    shapes: tuple[str, ...]
    modules: tuple[str, ...]
    install: str

    @property
    def missing(self) -> list[str]:
        return [name for name in self.modules if util.find_spec(name) is None]


RIVALS = {
    "transformers": Rival(
        pair_transformers, ("minimind2-v-small", "minimind-3v"), ("torch", "transformers"),
        "torch transformers",
    ),
    "mlx-lm": Rival(
        pair_mlx_lm, ("minimind2-v-small", "minimind2-v", "minimind-3v"), ("mlx_lm",),
        "'mlx-lm[cpu]'" if sys.platform == "linux" else "mlx-lm",
    ),
}  # fmt: skip


def difference(pair: Pair) -> float:
    """The largest between both sides' logits, as a share of the largest logit: in every row of the
    prompt, and after it with caches, where both read the tokens that ours says."""
    found = [(pair.ours.every_row(), pair.theirs.every_row())]
    (ours, own), (theirs, other) = pair.ours.read(), pair.theirs.read()
    for _ in range(CHECKED):
        found.append((np.array(ours.tolist()), np.array(theirs.tolist())))
        token = pair.likeliest(ours)
        ours, theirs = pair.ours.step(token, own), pair.theirs.step(token, other)
    found.append((np.array(ours.tolist()), np.array(theirs.tolist())))
    shares = [np.abs(one - two).max() / np.abs(two).max() for one, two in found]
    return float(np.max(shares))  # not a number where one is none


def require_equal(name: str, rival: str, pair: Pair) -> float:
    """What they differ by. Raises UserError where that is more than rounding."""
    differ = difference(pair)
    if not differ <= RTOL:
        raise UserError(
            f"{name} beside {rival}: logits differ by {differ:.1e} of the largest, and nothing is"
            f" timed unless they are equal to {RTOL}"
        )
    return differ


def timed(side: Side, pair: Pair, count: int) -> dict[str, float]:
    """Milliseconds up to the first token, and of each of so many more on average."""
    began = time.perf_counter()
    logits, cache = side.read()
    token = pair.likeliest(logits)
    token.tolist()
    first = time.perf_counter()
    for _ in range(count):
        coming = pair.likeliest(side.step(token, cache))
        token.tolist()  # handed over while the next is being computed
        token = coming
    token.tolist()
    took = time.perf_counter() - first
    return {pair.first: 1000 * (first - began), "token": 1000 * took / count}


def measure(name: str, rival: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of figures for each part, printed too."""
    config = shape(name)
    pair = RIVALS[rival].pair(config)
    differ = require_equal(name, rival, pair)
    ours, theirs = (partial(timed, one, pair, args.tokens) for one in (pair.ours, pair.theirs))
    title = f"{name} beside {rival}, runs"
    done = list(alternate(theirs, [ours], args.runs, args.warmup, 1, title))
    about = {
        "shape": name, "rival": rival, "device": pair.device, "difference": differ,
        "prompt_rows": config.N + TEXT_TOKENS,
    }  # fmt: skip
    rows = []
    for part in (pair.first, "token"):
        own, other = [one[part] for _, one, _ in done], [before[part] for _, _, before in done]
        gain = Gain.of(other, own)
        told = {"realised": gain.told, "p10": gain.p10, "p90": gain.p90}
        ms = {"ours_ms": spread(own), "theirs_ms": spread(other)}
        rows.append({**about, "part": part, **ms, "gain": told})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The parts of one shape beside one rival."""
    first = rows[0]
    print(
        f"\n{first['shape']} beside {first['rival']}, float32, {first['device']}, "
        f"{first['prompt_rows']} rows; logits differ by {first['difference']:.0e} of the largest"
    )
    print(f"{'ms, median':<14}{'ours':>9}{'theirs':>9}{'theirs ÷ ours':>16}{'p10 to p90':>16}")
    for row in rows:
        gain = row["gain"]
        ratio = "–" if gain["realised"] is None else f"{gain['realised']:.2f}"
        told = f"{gain['p10']:.2f} to {gain['p90']:.2f}"
        times = "".join(f"{row[side]['median']:>9.2f}" for side in ("ours_ms", "theirs_ms"))
        print(f"{row['part']:<14}{times}{ratio:>16}{told:>16}", flush=True)


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each shape beside each rival."""
    for rival in args.rival:
        for name in args.shape or RIVALS[rival].shapes:
            yield name, rival


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("rivals", __doc__, names_result=True)
    add = p.add_argument
    add("--shape", action="append", help=f"{', '.join(SHAPES)}; repeat (default: the rival's)")
    add("--rival", action="append", choices=RIVALS, help="repeat (default: both)")
    add("--tokens", type=positive, default=16, help="new tokens of every answer (default: 16)")
    add("--runs", type=positive, default=20, help="measured runs of each side (default: 20)")
    add("--warmup", type=natural, default=2, help="runs before them (default: 2)")
    args = p.parse_args(argv)
    args.rival = args.rival or list(RIVALS)
    for rival in args.rival:
        if missing := RIVALS[rival].missing:
            raise UserError(f"{', '.join(missing)} cannot be found, and --rival {rival} needs it; "
                            f"python -m pip install {RIVALS[rival].install}")  # fmt: skip
    for name, _ in wanted(args):
        shape(name)  # a wrong one is refused before any is measured
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all, printing each; everything that was found."""
    rows = []
    for name, rival in wanted(args):
        rows += (measured := measure(name, rival, args))
        show(measured)
    print(f"Medians of {args.runs} runs, nothing pruned. –: {NOT_TOLD}.")
    used = {name for rival in args.rival for name in RIVALS[rival].modules}
    own = {name.replace("_", "-"): metadata.version(name.replace("_", "-")) for name in used}
    return {
        "benchmark": "rivals", "dtype": "float32", "runs": args.runs, "warmup": args.warmup,
        "new_tokens": args.tokens, "machine": machine(), "versions": {**versions(), **own},
        "rows": rows,
    }  # fmt: skip


main = partial(finish, parse, run)


if __name__ == "__main__":
    main()
