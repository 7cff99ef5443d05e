"""How much work an answer takes, from the configuration alone: multiply-adds and cache bytes.

Counted are products of matrices: patches, linear layers, queries with keys and attention
with values, both over all L x L (the masked half is computed too, except that a prompt is
read in pieces, and a piece looks at no later one). Of experts the chosen and the shared ones
count, of the output layer the last row of a prompt. Not counted is everything else: norms,
activations, softmax, rotation, resizing, and whatever choosing tokens takes.

Shapes: N visual tokens of an image, n of them at present, K kept, S rows seen, L rows of a
prompt, D features, B prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..checkpoints.config import MiniMindConfig, MlxLmConfig, SiglipConfig, VLMConfig
from ..models.decoder import PREFILL_STEP_SIZE
from ..pruners import Pipeline, Stage, StepBudgets, downsample

Text = MiniMindConfig | MlxLmConfig


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of each part for one prompt, and what it leaves behind.

    Time to the first token is made of vision, projector and prefill; `decode` is one new
    token right after the prompt. `visual` says how many visual tokens, `rows` how many rows
    each layer of the language model holds after the prompt. `cache_bytes` are theirs.
    """

    vision: int
    projector: int
    prefill: int
    decode: int
    visual: tuple[int, ...]
    rows: tuple[int, ...]
    cache_bytes: int

    @property
    def first_token(self) -> int:
        """All that happens before the first token is known."""
        return self.vision + self.projector + self.prefill


def count(
    config: VLMConfig, text: int, pipeline: Pipeline, K: int, *, images: int = 1, itemsize: int = 4
) -> Operations:
    """Of a prompt with `text` words and some images, K of each image's tokens kept.

    As everywhere, K is the average over layers of a method that works in the decoder, and
    K = N is full. `itemsize` is the bytes of a number in the cache. B equal prompts take B
    times as much of everything. Raises UserError for a budget that the method cannot keep.
    """
    budgets = pipeline.budgets(config.N, K)
    vision, n = _tower(config, budgets)
    n = budgets.left_after(Stage.FEATURES, n)
    projected = projector(config, n)
    n = budgets.left_after(Stage.PROJECTED, n)
    visual = held(config.text, pipeline, n, K)
    rows = tuple(text + images * own for own in visual)
    return Operations(
        images * vision, images * projected, prefill(config.text, rows),
        decode(config.text, [own + 1 for own in rows]), tuple(images * own for own in visual),
        rows, cache_bytes(config.text, rows, itemsize),
    )  # fmt: skip


def _tower(config: VLMConfig, budgets: StepBudgets) -> tuple[int, int]:
    """Multiply-adds of the tower for one image, and how many tokens come out of it."""
    v, N, (down, across) = config.vision, budgets.N, config.merge
    patches, n, cuts = N * down * across, N, []
    for step, own in budgets.per_step:
        if step.stage is Stage.IMAGE and own < n:
            rows, columns = downsample.smaller_grid(config.grid, own)
            n = rows * columns
            patches = n * down * across
        elif step.stage is Stage.ENCODER and own < n:
            cuts += step.call(step.method.cuts, v.depth, n, own)
            n = own
    return tower(config, patches, cuts), n


def tower(config: VLMConfig, patches: int, cuts: Sequence[tuple[int, str, int]] = ()) -> int:
    """Multiply-adds of the tower for one image; at each of `cuts` (layer, "before" it or in its
    "middle", K) tokens leave."""
    v = config.vision
    D, cls = v.hidden_size, 0 if isinstance(v, SiglipConfig) else 1
    total, n = patches * D * 3 * v.patch_size**2, patches
    for layer in range(v.depth):
        n = _left(n, cuts, layer, "before")
        S = n + cls
        total += S * 4 * D * D + 2 * S * S * D
        n = _left(n, cuts, layer, "middle")
        total += (n + cls) * 2 * D * v.intermediate_size
    return total


def _left(n: int, cuts: Sequence[tuple[int, str, int]], layer: int, place: str) -> int:
    for at, where, K in cuts:
        n = min(n, K) if (at, where) == (layer, place) else n
    return n


def projector(config: VLMConfig, n: int) -> int:
    """Multiply-adds of the projector for n visual tokens."""
    down, across = config.merge
    D, wide = config.text.hidden_size, config.vision.hidden_size * down * across
    return n * (wide * D + (D * D if config.projector else 0))


def held(text: Text, pipeline: Pipeline, n: int, K: int) -> tuple[int, ...]:
    """How many of an image's n tokens each layer of the language model holds."""
    layers, step = text.num_hidden_layers, pipeline.decoder
    told = [n] * layers
    if step and n > K:
        for layer, left in sorted(step.call(step.method.schedule, layers, n, K).items()):
            told[layer:] = [left] * (layers - layer)
    return tuple(told)


def prefill(text: Text, rows: Sequence[int]) -> int:
    """Multiply-adds of reading a prompt, of which each layer holds so many rows."""
    wide = text.num_attention_heads * text.head_dim
    seen = sum(L * S for own in rows for L, S in _pieces(own))
    return sum(rows) * _linear(text) + 2 * seen * wide + _logits(text)


def _pieces(L: int) -> Iterator[tuple[int, int]]:
    """The pieces in which L rows are read: how many rows, and how many they see."""
    for begin in range(0, L, PREFILL_STEP_SIZE):
        end = min(L, begin + PREFILL_STEP_SIZE)
        yield end - begin, end


def decode(text: Text, seen: Sequence[int]) -> int:
    """Multiply-adds of one new token that sees so many rows in each layer, itself included."""
    wide = text.num_attention_heads * text.head_dim
    return len(seen) * _linear(text) + 2 * sum(seen) * wide + _logits(text)


def _linear(text: Text) -> int:
    """Of one row through the matrices of one layer."""
    if isinstance(text, MlxLmConfig):
        return text.layer_size
    D, d = text.hidden_size, text.head_dim
    network = 3 * D * text.intermediate_size
    if text.num_experts:
        network *= text.num_experts_per_tok + text.n_shared_experts
        network += D * text.num_experts  # the router
    return 2 * D * (text.num_attention_heads + text.num_key_value_heads) * d + network


def _logits(text: Text) -> int:
    return text.hidden_size * text.vocab_size


def cache_bytes(text: Text, rows: Sequence[int], itemsize: int = 4) -> int:
    """Of keys and values, with so many rows in each layer."""
    return sum(rows) * 2 * text.num_key_value_heads * text.head_dim * itemsize
