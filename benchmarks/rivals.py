"""Are we as fast as what one would take instead? `python -m benchmarks.rivals`.

Neither side prunes: pruning gains little where the same model runs faster in another library.
`transformers`: torch_ref beside CLIPVisionModel or SiglipVisionModel with LlamaForCausalLM or
Qwen3ForCausalLM (sdpa), timed from pixels to first token, and per new token. `mlx-lm`: our language
model on MLX beside mlx-lm's llama or qwen3, timed for a prefill of as many rows as such a prompt
has, and per new token. Both sides keep a cache, compute logits of a prompt's last row only, and
start to compute a token before the previous one is read.

Both have the same random weights and alternate in one process after a warm-up. Their logits are
compared first: they may differ by 0.001 of the largest. A ratio, theirs ÷ ours, is reported only if
it spreads by no more than it differs from 1 (mlx_vlm_prune/machine/timing.py). The last line is
one JSON object of all figures.

The rival of every method, a smaller image, is a pruner itself; it is measured beside others by
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
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_vlm_prune.checkpoints.config import MiniMindConfig, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.machine.hardware import describe_machine, versions
from mlx_vlm_prune.machine.timing import NOT_REPORTED, Gain, alternate, spread
from mlx_vlm_prune.models.cache import LayerCache
from mlx_vlm_prune.models.language.minimind import MiniMind

from .backend_mlx import device
from .command_line import natural, parser, positive, run_command
from .model_shapes import SHAPES, TEXT_TOKENS, shape

RTOL = 1e-3  # of the largest logit
CHECKED = 4  # new tokens whose logits are compared, read with caches


class Side(Protocol):
    """One implementation with a prompt."""

    def prompt_logits(self) -> np.ndarray:
        """Logits (L, V) of the whole prompt, without a cache."""

    def prefill(self) -> tuple[Any, Any]:
        """Logits (1, V) after the prompt, and a cache that was empty before."""

    def step(self, token: Any, cache: Any) -> Any:
        """Logits (1, V) after one more token; the cache grows by it."""


@dataclass(frozen=True)
class Pair:
    """Two sides with the same weights; `argmax_token` starts to compute the next token."""

    ours: Side
    theirs: Side
    argmax_token: Callable[[Any], Any]
    first_part: str  # the name of what is timed up to the first token
    device: str


@dataclass
class DecodingState:
    """Our language model's cache and the position (1, 1) of the next token."""

    cache: list[LayerCache]
    position: mx.array


class OurLanguage:
    """Our language model, called as `VLM` calls it for a prompt without padding.

    `contiguous` is False of a prompt that is read as one whose positions have gaps.
    """

    def __init__(self, model: MiniMind, embeds_1LD: mx.array, contiguous: bool = True):
        self.model, self.embeds_1LD, self.contiguous = model, embeds_1LD, contiguous

    def prompt_logits(self) -> np.ndarray:
        x_1LD = self._read_prompt(self.model.make_cache())
        return np.array(self.model.logits(x_1LD)[0].astype(mx.float32))

    def prefill(self) -> tuple[mx.array, DecodingState]:
        cache = self.model.make_cache()
        x_1LD = self._read_prompt(cache)
        next_11 = mx.array([[x_1LD.shape[1]]], dtype=mx.int32)
        return self.model.logits(x_1LD[:, -1]), DecodingState(cache, next_11)

    def step(self, token_1: mx.array, state: DecodingState) -> mx.array:
        x_11D, layers = self.model.embed_tokens(token_1[None]), range(self.model.depth)
        x_11D = self.model.run(layers, x_11D, state.position, state.cache, contiguous=True)
        state.position = state.position + 1
        return self.model.logits(x_11D[:, -1])

    def _read_prompt(self, cache: list[LayerCache]) -> mx.array:
        """Hidden states (1, L, D) after all layers."""
        x_1LD, layers = self.embeds_1LD, range(self.model.depth)
        positions_1L = mx.arange(x_1LD.shape[1], dtype=mx.int32)[None]
        return self.model.run(layers, x_1LD, positions_1L, cache, contiguous=self.contiguous)


class TheirLanguage:
    """mlx-lm's language model with the same weights, called with embeddings."""

    def __init__(self, model: MiniMind, embeds_1LD: mx.array):
        family = import_module(f"mlx_lm.models.{'qwen3' if model.config.qk_norm else 'llama'}")
        self.make_cache = import_module("mlx_lm.models.cache").make_prompt_cache
        sizes = {**asdict(model.config), "head_dim": model.config.head_dim}
        fields = {**sizes, "model_type": family.__name__}
        self.model = family.Model(family.ModelArgs.from_dict(fields))
        down_proj = model.layers[0].mlp.down_proj
        if isinstance(down_proj, nn.QuantizedLinear):
            nn.quantize(self.model, down_proj.group_size, down_proj.bits)
        weights: Any = tree_flatten({"model": model.parameters()})
        self.model.load_weights(
            [(name.replace("model.lm_head", "lm_head"), weight) for name, weight in weights]
        )
        self.embeds_1LD = embeds_1LD

    def prompt_logits(self) -> np.ndarray:
        logits_1LV = self.model(None, input_embeddings=self.embeds_1LD)
        return np.array(logits_1LV[0].astype(mx.float32))

    def prefill(self) -> tuple[mx.array, Any]:
        cache = self.make_cache(self.model)
        # Their model scores every row of a prompt; past its head, only the last.
        hidden_1LD = self.model.model(None, cache, input_embeddings=self.embeds_1LD)
        tied = self.model.args.tie_word_embeddings
        head = self.model.model.embed_tokens.as_linear if tied else self.model.lm_head
        return head(hidden_1LD[:, -1]), cache

    def step(self, token_1: mx.array, cache: Any) -> mx.array:
        return self.model(token_1[None], cache=cache)[:, -1]


def pair_mlx_lm(config: VLMConfig) -> Pair:
    """Both language models on MLX, and as many random embeddings as a prompt of the shape has."""
    mx.random.seed(0)
    assert isinstance(config.text, MiniMindConfig)
    model = MiniMind(config.text)
    # At their initial ones a norm in another's place is not seen.
    model.update(tree_map(lambda w: w + 0.1 * mx.random.normal(w.shape) * (w.ndim == 1),
                          model.parameters()))  # fmt: skip
    return pair_languages(model, config.N + TEXT_TOKENS)


def pair_languages(model: MiniMind, rows: int, contiguous: bool = True) -> Pair:
    """Our language model and mlx-lm's with its weights, and a prompt of random embeddings."""
    dtype = model.norm.weight.dtype
    embeds_1LD = mx.random.normal((1, rows, model.config.hidden_size)).astype(dtype)
    mx.eval(model.parameters(), embeds_1LD)

    def argmax_token(logits_1V: mx.array) -> mx.array:
        token_1 = mx.argmax(logits_1V, axis=-1)
        mx.async_eval(token_1)
        return token_1

    ours = OurLanguage(model, embeds_1LD, contiguous)
    theirs = TheirLanguage(model, embeds_1LD)
    return Pair(ours, theirs, argmax_token, "prefill", f"mlx on {device()}")


def pair_transformers(config: VLMConfig) -> Pair:
    """Tower, projector and language model in PyTorch."""
    from . import backend_torch
    from .rival_transformers import argmax_token, make_stacks

    device_name = f"torch on {backend_torch.device()}"
    return Pair(*make_stacks(config), argmax_token, "first token", device_name)


@dataclass(frozen=True)
class Rival:
    """How to make the pair, on which shapes, and which modules it needs."""

    make_pair: Callable[[VLMConfig], Pair]
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


def largest_difference(pair: Pair) -> float:
    """The largest difference between both sides' logits, as a share of the largest logit.

    Compared are all rows of the prompt, and CHECKED new tokens read with caches. Both sides read
    our side's tokens.
    """
    logits = [(pair.ours.prompt_logits(), pair.theirs.prompt_logits())]
    (ours, our_state), (theirs, their_state) = pair.ours.prefill(), pair.theirs.prefill()
    for _ in range(CHECKED):
        logits.append((np.array(ours.tolist()), np.array(theirs.tolist())))
        token = pair.argmax_token(ours)
        ours, theirs = pair.ours.step(token, our_state), pair.theirs.step(token, their_state)
    logits.append((np.array(ours.tolist()), np.array(theirs.tolist())))
    shares = [np.abs(one - two).max() / np.abs(two).max() for one, two in logits]
    return float(np.max(shares))  # NaN if any is NaN


def require_equal(name: str, rival: str, pair: Pair, rtol: float = RTOL) -> float:
    """The largest difference of both sides' logits. Raises UserError where it is above `rtol`."""
    difference = largest_difference(pair)
    if not difference <= rtol:
        raise UserError(
            f"{name} beside {rival}: logits differ by {difference:.1e} of the largest, and nothing"
            f" is timed unless they are equal to {rtol}"
        )
    return difference


def time_answer(side: Side, pair: Pair, count: int) -> dict[str, float]:
    """Milliseconds up to the first token, and the mean of each of `count` more tokens."""
    began = time.perf_counter()
    logits, cache = side.prefill()
    token = pair.argmax_token(logits)
    token.tolist()
    first_token = time.perf_counter()
    for _ in range(count):
        next_token = pair.argmax_token(side.step(token, cache))
        token.tolist()  # read while the next is being computed
        token = next_token
    token.tolist()
    seconds = time.perf_counter() - first_token
    return {pair.first_part: 1000 * (first_token - began), "token": 1000 * seconds / count}


def measure(name: str, rival: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row of figures for the first part and one for each new token."""
    config = shape(name)
    pair = RIVALS[rival].make_pair(config)
    difference = require_equal(name, rival, pair)
    header = {
        "shape": name, "rival": rival, "device": pair.device, "difference": difference,
        "prompt_rows": config.N + TEXT_TOKENS,
    }  # fmt: skip
    return measure_pair(pair, header, args)


def measure_pair(
    pair: Pair, header: dict[str, Any], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of a pair, with the fields of `header`; `args` says how many runs and tokens."""
    sides = pair.ours, pair.theirs
    ours, theirs = (partial(time_answer, side, pair, args.tokens) for side in sides)
    title = f"{header['shape']} beside {header['rival']}, runs"
    runs = list(alternate(theirs, [ours], args.runs, args.warmup, 1, title))
    rows = []
    for part in (pair.first_part, "token"):
        ours_ms = [ours[part] for _, ours, _ in runs]
        theirs_ms = [theirs[part] for _, _, theirs in runs]
        gain = Gain.of(theirs_ms, ours_ms)
        ratio = {"realised": gain.reported, "p10": gain.p10, "p90": gain.p90}
        ms = {"ours_ms": spread(ours_ms), "theirs_ms": spread(theirs_ms)}
        rows.append({**header, "part": part, **ms, "gain": ratio})
    return rows


def print_rows(rows: Sequence[dict[str, Any]], dtype: str = "float32") -> None:
    """Print the parts of one shape beside one rival."""
    first = rows[0]
    print(
        f"\n{first['shape']} beside {first['rival']}, {dtype}, {first['device']}, "
        f"{first['prompt_rows']} rows; logits differ by {first['difference']:.0e} of the largest"
    )
    print(f"{'ms, median':<14}{'ours':>9}{'theirs':>9}{'theirs ÷ ours':>16}{'p10 to p90':>16}")
    for row in rows:
        gain = row["gain"]
        ratio = "–" if gain["realised"] is None else f"{gain['realised']:.2f}"
        deciles = f"{gain['p10']:.2f} to {gain['p90']:.2f}"
        times = "".join(f"{row[side]['median']:>9.2f}" for side in ("ours_ms", "theirs_ms"))
        print(f"{row['part']:<14}{times}{ratio:>16}{deciles:>16}", flush=True)


def chosen_pairs(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Each (shape, rival) to be measured."""
    for rival in args.rival:
        for name in args.shape or RIVALS[rival].shapes:
            yield name, rival


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser("rivals", __doc__, names_result=True)
    add = p.add_argument
    add("--shape", action="append", help=f"{', '.join(SHAPES)}; repeat (default: the rival's)")
    add("--rival", action="append", choices=RIVALS, help="repeat (default: both)")
    add("--tokens", type=positive, default=16, help="new tokens of every answer")
    add("--runs", type=positive, default=20, help="measured runs of each side")
    add("--warmup", type=natural, default=2, help="warm-up runs of each side")
    args = p.parse_args(argv)
    args.rival = args.rival or list(RIVALS)
    for rival in args.rival:
        if missing := RIVALS[rival].missing:
            raise UserError(f"{', '.join(missing)} cannot be found, and --rival {rival} needs it; "
                            f"python -m pip install {RIVALS[rival].install}")  # fmt: skip
    for name, _ in chosen_pairs(args):
        shape(name)  # a wrong one is refused before any is measured
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print every pair; the result."""
    rows = []
    for name, rival in chosen_pairs(args):
        rows += (measured := measure(name, rival, args))
        print_rows(measured)
    print(f"Medians of {args.runs} runs, nothing pruned. –: {NOT_REPORTED}.")
    modules = {name for rival in args.rival for name in RIVALS[rival].modules}
    packages = [name.replace("_", "-") for name in modules]
    rival_versions = {name: metadata.version(name) for name in packages}
    return {
        "benchmark": "rivals", "dtype": "float32", "runs": args.runs, "warmup": args.warmup,
        "new_tokens": args.tokens, "machine": describe_machine(),
        "versions": {**versions(), **rival_versions}, "rows": rows,
    }  # fmt: skip


main = partial(run_command, parse, run)


if __name__ == "__main__":
    main()
