"""Operation counts of an answer, from the configuration alone: multiply-adds and cache bytes.

Matrix products are counted: patches, linear layers, queries with keys and attention with values,
both over all L x L (the masked half is computed too; but a prompt is read in pieces, and no piece
attends to a later one). Of experts the chosen and the shared ones are counted, of the output layer
the last row of a prompt. Nothing else is: norms, activations, softmax, rotation, resizing, and the
selection of tokens.

Shapes: N visual tokens of an image, n of them at present, K kept, S rows attended to, L rows of a
prompt, D features, B prompts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from ..checkpoints.config import MiniMindConfig, MlxLmConfig, SiglipConfig, VLMConfig
from ..models.image_encoder import smaller_grids, steps_inside
from ..models.layers import PREFILL_STEP_SIZE
from ..pruners import Pipeline, Stage, StepBudgets


@dataclass(frozen=True)
class MatrixSizes:
    """The sizes of a language model whose layers' matrices were counted: `layer_size` numbers in
    those of each."""

    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_size: int


Text = MiniMindConfig | MlxLmConfig | MatrixSizes


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of each part for one prompt, and the cache after it.

    The time to the first token consists of vision, projector and prefill. `decode` is one new token
    right after the prompt. `visual` and `rows` are the visual tokens and all rows that each layer
    of the language model holds after the prompt; `cache_bytes` are the bytes of these rows.
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
        """The multiply-adds up to the first token."""
        return self.vision + self.projector + self.prefill


def count(
    config: VLMConfig, text: int, pipeline: Pipeline, K: int, *, images: int = 1, itemsize: int = 4
) -> Operations:
    """The operations of a prompt with `text` tokens of text, K tokens of each image kept.

    For a decoder method K is the average over layers; K = N is full. `itemsize` is the bytes of a
    number in the cache. B equal prompts take B times as much of everything. Raises UserError for a
    budget that the method cannot keep.
    """
    budgets = pipeline.budgets(config.N, K)
    vision, n = _tower(config, budgets)
    n = budgets.left_after(Stage.FEATURES, n)
    projected = projector(config, n)
    n = budgets.left_after(Stage.PROJECTED, n)
    visual = tokens_by_layer(config.text, pipeline, n, K)
    rows = tuple(text + images * tokens for tokens in visual)
    return Operations(
        images * vision, images * projected, prefill(config.text, rows),
        decode(config.text, [S + 1 for S in rows]), tuple(images * tokens for tokens in visual),
        rows, cache_bytes(config.text, rows, itemsize),
    )  # fmt: skip


def _tower(config: VLMConfig, budgets: StepBudgets) -> tuple[int, int]:
    """Multiply-adds of the tower for one image, and the number of its output tokens."""
    v, (down, across), cuts, attended = config.vision, config.merge, [], dict[int, int]()
    grids = smaller_grids(config.grid, budgets)
    n = prod(grids[-1]) if grids else budgets.N
    for step, there, K in steps_inside(budgets, n):
        cuts += step.call(step.method.cuts, v.depth, there, K)
        attended |= dict.fromkeys(budgets.whole_layers(step, v.depth, v.layers_behind), there)
    return tower(config, n * down * across, cuts, attended), budgets.left_after(Stage.ENCODER, n)


def tower(
    config: VLMConfig,
    patches: int,
    cuts: Sequence[tuple[int, str, int]] = (),
    attended: Mapping[int, int] = MappingProxyType({}),
) -> int:
    """Multiply-adds of the tower for one image.

    `cuts` are (layer, "before" the layer or in its "middle", K): the places where K tokens stay;
    `attended` says of layers how many tokens they attend to, where some of those left.
    """
    v = config.vision
    D, cls = v.hidden_size, 0 if isinstance(v, SiglipConfig) else 1
    total, n = patches * D * 3 * v.patch_size**2, patches
    for layer in range(v.depth):
        n = _tokens_after_cuts(n, cuts, layer, "before")
        S, A = n + cls, attended.get(layer, n) + cls
        total += (S + A) * 2 * D * D + 2 * S * A * D
        n = _tokens_after_cuts(n, cuts, layer, "middle")
        total += (n + cls) * 2 * D * v.intermediate_size
    return total


def _tokens_after_cuts(n: int, cuts: Sequence[tuple[int, str, int]], layer: int, place: str) -> int:
    for cut_layer, cut_place, K in cuts:
        n = min(n, K) if (cut_layer, cut_place) == (layer, place) else n
    return n


def projector(config: VLMConfig, n: int) -> int:
    """Multiply-adds of the projector for n visual tokens."""
    down, across = config.merge
    D, width = config.text.hidden_size, config.vision.hidden_size * down * across
    return n * (width * D + (D * D if config.projector else 0))


def tokens_by_layer(text: Text, pipeline: Pipeline, n: int, K: int) -> tuple[int, ...]:
    """How many of an image's n tokens each layer of the language model holds."""
    layers, step = text.num_hidden_layers, pipeline.decoder
    tokens = [n] * layers
    if step and n > K:
        for layer, left in sorted(step.call(step.method.schedule, layers, n, K).items()):
            tokens[layer:] = [left] * (layers - layer)
    return tuple(tokens)


def prefill(text: Text, rows: Sequence[int]) -> int:
    """Multiply-adds of reading a prompt; `rows` are those of each layer."""
    width = text.num_attention_heads * text.head_dim
    attended = sum(L * S for layer_rows in rows for L, S in _pieces(layer_rows))
    return sum(rows) * _linear(text) + 2 * attended * width + _logits(text)


def _pieces(L: int) -> Iterator[tuple[int, int]]:
    """The pieces in which L rows are read: their rows, and the rows they attend to."""
    for begin in range(0, L, PREFILL_STEP_SIZE):
        end = min(L, begin + PREFILL_STEP_SIZE)
        yield end - begin, end


def decode(text: Text, rows: Sequence[int]) -> int:
    """Multiply-adds of one new token; `rows` are those of each layer, itself included."""
    width = text.num_attention_heads * text.head_dim
    return len(rows) * _linear(text) + 2 * sum(rows) * width + _logits(text)


def _linear(text: Text) -> int:
    """Multiply-adds of one row in the linear layers of one decoder layer."""
    if not isinstance(text, MiniMindConfig):
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
    """The bytes of keys and values; `rows` are those of each layer."""
    return sum(rows) * 2 * text.num_key_value_heads * text.head_dim * itemsize
