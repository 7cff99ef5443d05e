"""MiniMind2-V: encode, prune, project, splice, decode. The only caller of pruners.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept of each image,
L tokens of the spliced sequence, D features, V words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import mlx.core as mx
from mlx import nn

from .cache import LayerCache
from .language.minimind import MiniMind, MiniMindConfig
from .pruners import Pruner, Reduction
from .pruners.attention_pool import AttentionPool
from .towers.clip import CLIPConfig, CLIPTower

Policy = Literal["keep", "renumber"]
PIECE = 2048  # tokens of a prompt read at once


class Row(Protocol):
    """One prompt: token ids, and where each image's placeholders stand (start, length)."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def runs(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class VLMConfig:
    """What config.json says; `pruner` is the name and size of learned weights, if any."""

    vision: CLIPConfig = field(default_factory=CLIPConfig)
    text: MiniMindConfig = field(default_factory=MiniMindConfig)
    image_token: str = "@"
    image_token_id: int = 34
    pruner: tuple[str, int] | None = None


@dataclass(frozen=True)
class Spliced:
    """The spliced prompt: embeddings, positions (-1 is padding), and where decoding goes on."""

    embeds_BLD: mx.array
    positions_BL: mx.array
    next_B1: mx.array
    lengths: list[int]  # tokens of each row, padding left out

    @property
    def padded(self) -> bool:
        return min(self.lengths) < self.positions_BL.shape[1]


@dataclass(frozen=True)
class Prefill:
    """What the first forward pass hands to decoding."""

    logits_BLV: mx.array
    kept: Reduction | None  # None without an image
    next_B1: mx.array  # the position of the first new token
    lengths: list[int]
    padded: bool
    cache: list[LayerCache]


def _no_lap(name: str, value: Any) -> Any:
    return value


class VLM(nn.Module):
    """A vision-language model that reads K of N visual tokens."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.tower = CLIPTower(config.vision)
        self.projector = nn.Linear(config.vision.hidden_size, config.text.hidden_size)
        self.language = MiniMind(config.text)
        if config.pruner:
            self.pruner = AttentionPool(config.pruner[1], config.vision.hidden_size)

    def __call__(
        self,
        rows: Sequence[Row],
        pixels_IHW3: mx.array | None,
        pruner: Pruner,
        K: int,
        positions: Policy = "keep",
        *,
        last_only: bool = True,
        lap: Callable[[str, Any], Any] = _no_lap,
    ) -> Prefill:
        """Read B prompts with I images. `lap(name, value)` may evaluate and time each part."""
        kept = visual = None
        if pixels_IHW3 is not None:
            seen = lap("vision", self.tower(pixels_IHW3, want=pruner.want))  # encode
            kept = lap("pruner", pruner(seen, K))  # prune
            visual = self.projector(kept.tokens(seen.x_BND))  # project
        told = splice(self.language.embed_tokens, rows, visual, kept, positions)  # splice
        cache = self.language.make_cache()
        logits_BLV = self.read(told, cache, last_only)  # decode
        lap("prefill", logits_BLV)
        return Prefill(logits_BLV, kept, told.next_B1, told.lengths, told.padded, cache)

    def read(self, told: Spliced, cache: list[LayerCache], last_only: bool) -> mx.array:
        """Logits (B, L, V), or (B, 1, V) of the last token.

        A long prompt is read in pieces: memory must not grow with its square.
        """
        logits = []
        for begin in range(0, told.positions_BL.shape[1], PIECE):
            embeds_BLD = told.embeds_BLD[:, begin : begin + PIECE]
            positions_BL = told.positions_BL[:, begin : begin + PIECE]
            options = {"padded": told.padded, "last_only": last_only}
            logits.append(self.language(embeds_BLD, positions_BL, cache, **options))
            mx.eval(logits[-1])
        return logits[-1] if last_only else mx.concatenate(logits, axis=1)

    def step(self, token_B1: mx.array, position_B1: mx.array, before: Prefill) -> mx.array:
        """Logits (B, 1, V) after one more token; the cache in `before` grows by it."""
        embeds_B1D = self.language.embed_tokens(token_B1)
        return self.language(embeds_B1D, position_B1, before.cache, padded=before.padded)


def splice(
    embed: Callable[[mx.array], mx.array],
    rows: Sequence[Row],
    visual_IKD: mx.array | None,
    kept: Reduction | None,
    policy: Policy,
) -> Spliced:
    """Put each image's kept tokens where its placeholders stood, with their positions.

    `keep`: a token keeps the position it had among all; `renumber`, and slots without an
    anchor: positions count what is left. Shorter rows are padded on the left.
    """
    image, pieces = 0, []
    for row in rows:
        embeds, places, cursor = [], [], 0
        for start, length in row.runs:
            assert visual_IKD is not None and kept is not None
            embeds += [embed(_ids(row.ids[cursor:start])), visual_IKD[image]]
            if kept.index_BK is not None:
                places += [mx.arange(cursor, start), start + kept.index_BK[image]]
            cursor, image = start + length, image + 1
        embeds.append(embed(_ids(row.ids[cursor:])))
        places.append(mx.arange(cursor, len(row.ids)))
        pieces.append(
            (mx.concatenate(embeds), mx.concatenate([p.astype(mx.int32) for p in places]))
        )
    assert visual_IKD is None or image == len(visual_IKD), "every image has its placeholders"
    renumber = policy == "renumber" or (kept is not None and kept.index_BK is None)
    return _pad(pieces, [len(row.ids) for row in rows], renumber)


def _ids(ids: Sequence[int]) -> mx.array:
    return mx.array(list(ids), dtype=mx.int32)


def _pad(pieces: list[tuple[mx.array, mx.array]], full: list[int], renumber: bool) -> Spliced:
    lengths = [len(embeds) for embeds, _ in pieces]
    L = max(lengths)
    embeds_BLD = mx.stack([mx.pad(e, [(L - len(e), 0), (0, 0)]) for e, _ in pieces])
    if renumber:
        places = [mx.arange(length, dtype=mx.int32) for length in lengths]
    else:
        places = [p for _, p in pieces]
    positions_BL = mx.stack([mx.pad(p, [(L - len(p), 0)], constant_values=-1) for p in places])
    next_B1 = mx.array(lengths if renumber else full, dtype=mx.int32)[:, None]
    return Spliced(embeds_BLD, positions_BL, next_B1, lengths)
