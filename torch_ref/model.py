"""MiniMind2-V: encode, prune, project, splice, decode, in PyTorch.

Module names are those of the published .pth and of Hugging Face's CLIP folder, so
both load unrenamed; `tower`, `projector` and `language` are what the parts are.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept, L tokens,
S tokens with those decoded, D features, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convert.checkpoint import read_published
from convert.errors import UserError
from convert.files import RawTensor

from .language.minimind import MiniMind, MiniMindConfig
from .language.splice import Row, Spliced, splice, visible
from .pruners import METHODS, reduce, wanted
from .pruners.attention_pool import AttentionPool
from .towers.clip import CLIPConfig, CLIPTower


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass(frozen=True)
class VLMConfig:
    """A MiniMind2-V: its tower, its language model, and the tokens with a meaning."""

    vision: CLIPConfig = field(default_factory=CLIPConfig)
    text: MiniMindConfig = field(default_factory=MiniMindConfig)
    image_token_id: int = 34
    eos_token_id: int = 2
    pool_tokens: int | None = None  # how many tokens its learned pruner keeps, where it has one


@dataclass
class Decoding:
    """What a step of decoding continues from; every step changes it."""

    cache: list[list]
    real_BS: Tensor
    next_B: Tensor
    logits_BV: Tensor  # of the next token


def _fields(kind: type, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: sizes[f.name] for f in fields(kind)}


def _tensor(raw: RawTensor) -> Tensor:
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.from_numpy(np.array(raw.data)).view(kinds[raw.dtype]).reshape(raw.shape)


class VisionEncoder(nn.Module):
    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.vision_model = CLIPTower(c)


class VisionProj(nn.Module):
    def __init__(self, c: VLMConfig):
        super().__init__()
        self.vision_proj = nn.Sequential(nn.Linear(c.vision.hidden_size, c.text.hidden_size))


class PooledVisionProj(AttentionPool):
    """EfficientVLM's, where the pool's weights lie beside the projector's."""

    def __init__(self, c: VLMConfig, K: int):
        super().__init__(K, c.vision.hidden_size)
        self.vision_proj = nn.Sequential(nn.Linear(c.vision.hidden_size, c.text.hidden_size))


class VLM(nn.Module):
    """A MiniMind2-V."""

    def __init__(self, config: VLMConfig):
        super().__init__()
        self.config = config
        self.model = MiniMind(config.text)
        pooled = config.pool_tokens
        self.vision_proj = PooledVisionProj(config, pooled) if pooled else VisionProj(config)
        self.vision_encoder = VisionEncoder(config.vision)

    @classmethod
    def from_pth(
        cls, path: str | Path, clip_folder: str | Path, device: torch.device | None = None
    ) -> "VLM":
        """MiniMind2-V as published since April 2025: a .pth, and a CLIP folder beside it.

        In float32, ready to answer, on the best device unless one is given. Raises
        UserError for files that cannot be read or that hold another model.
        """
        published = read_published(Path(path), Path(clip_folder))
        sizes, pruner = published.sizes, published.sizes.get("pruner")
        vision = CLIPConfig(**_fields(CLIPConfig, sizes["vision_config"]))
        text = MiniMindConfig(**_fields(MiniMindConfig, sizes["text_config"]))
        model = cls(VLMConfig(vision, text, pool_tokens=pruner and pruner["tokens"]))
        prefix = {True: "vision_encoder.", False: ""}
        state = {
            prefix[name.startswith("vision_model.")] + name: _tensor(raw)
            for name, raw in published.tensors.items()
        }
        model.load_state_dict(state)
        return model.eval().to(device or best_device())

    @property
    def tower(self) -> CLIPTower:
        return self.vision_encoder.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.vision_proj.vision_proj

    @property
    def language(self) -> MiniMind:
        return self.model

    @property
    def pool(self) -> AttentionPool | None:
        """The learned pruner's weights, where the checkpoint has some."""
        return self.vision_proj if isinstance(self.vision_proj, AttentionPool) else None

    def logits(
        self,
        rows: Sequence[Row],
        pixels_I3HW: Tensor | None,
        pruner: str = "none",
        K: int | None = None,
        positions: str = "keep",
        options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Scores (B, L, V) after every token of the pruned prompts, padded on the left.

        `pixels_I3HW` are the images of all rows, in order. K is how many visual tokens
        of each image stay; without it all do, or as many as a learned pruner was
        trained for. `positions` is "keep" or "renumber". `options` are the pruner's.
        Raises UserError for what does not fit.
        """
        spliced = self.read(rows, pixels_I3HW, pruner, K, positions, dict(options or {}))
        hidden_BLD = self.language(
            spliced.embeds_BLD, spliced.positions_BL, visible(spliced.real_BL)
        )
        return self.language.logits(hidden_BLD)

    @torch.no_grad()
    def generate(
        self,
        rows: Sequence[Row],
        pixels_I3HW: Tensor | None,
        pruner: str = "none",
        K: int | None = None,
        positions: str = "keep",
        options: Mapping[str, Any] | None = None,
        max_tokens: int = 64,
    ) -> list[list[int]]:
        """The most likely next token, again and again: new ids per row, without the end token."""
        state = self.prefill(rows, pixels_I3HW, pruner, K, positions, options)
        said: list[list[int]] = [[] for _ in rows]
        talking = list(range(len(rows)))
        for i in range(max_tokens):
            token_B = state.logits_BV.argmax(-1)
            chosen = token_B.tolist()
            talking = [b for b in talking if chosen[b] != self.config.eos_token_id]
            for b in talking:
                said[b].append(chosen[b])
            if not talking or i == max_tokens - 1:
                break
            self.step(state, token_B)
        return said

    def prefill(
        self,
        rows: Sequence[Row],
        pixels_I3HW: Tensor | None,
        pruner: str = "none",
        K: int | None = None,
        positions: str = "keep",
        options: Mapping[str, Any] | None = None,
    ) -> Decoding:
        """Read the prompts into a cache. Arguments as of `logits`."""
        spliced = self.read(rows, pixels_I3HW, pruner, K, positions, dict(options or {}))
        cache: list[list] = [[] for _ in self.language.layers]
        seen_BLL = visible(spliced.real_BL)
        hidden_BLD = self.language(spliced.embeds_BLD, spliced.positions_BL, seen_BLL, cache)
        logits_BV = self.language.logits(hidden_BLD[:, -1])
        return Decoding(cache, spliced.real_BL, spliced.next_B, logits_BV)

    def step(self, state: Decoding, token_B: Tensor) -> None:
        """Read one token per row; `state.logits_BV` then scores the one after it."""
        state.real_BS = torch.cat([state.real_BS, torch.ones_like(state.real_BS[:, :1])], dim=1)
        embeds_B1D = self.language.embed_tokens(token_B[:, None])
        hidden_B1D = self.language(
            embeds_B1D, state.next_B[:, None], state.real_BS[:, None], state.cache
        )
        state.next_B = state.next_B + 1  # not the cache's length: pruned tokens have no row there
        state.logits_BV = self.language.logits(hidden_B1D[:, 0])

    def read(
        self,
        rows: Sequence[Row],
        pixels_I3HW: Tensor | None,
        pruner: str,
        K: int | None,
        positions: str,
        options: dict[str, Any],
    ) -> Spliced:
        """Encode, prune, project, splice."""
        if positions not in ("keep", "renumber"):
            raise UserError(f"positions are keep or renumber, not {positions!r}")
        K, N = self.budget(pruner, K), self.config.vision.side**2
        embed, images = self.language.embed_tokens, 0 if pixels_I3HW is None else len(pixels_I3HW)
        runs = [run for row in rows for run in row.runs]
        if len(runs) != images:
            raise UserError(f"the prompts place {len(runs)} images, and {images} are given")
        assert all(length == N for _, length in runs), f"an image is a run of {N} placeholders"
        if pixels_I3HW is None or not images:
            return splice(embed, rows, None, None, positions)
        seen = self.tower(pixels_I3HW.to(embed.weight), want=wanted(pruner, options))
        kept = reduce(pruner, seen, K, self.pool if pruner == "attention_pool" else None, **options)
        visual_IKD = self.projector(kept.tokens(seen.x_BND))
        return splice(embed, rows, visual_IKD, kept, positions)

    def budget(self, pruner: str, K: int | None) -> int:
        """How many of the N tokens a pruner shall keep; UserError where it cannot."""
        N, trained = self.config.vision.side**2, self.config.pool_tokens
        if pruner not in METHODS:
            raise UserError(f"no pruner is called {pruner!r}; there are {', '.join(METHODS)}")
        if K is not None and not 1 <= K <= N:
            raise UserError(f"cannot keep {K} of {N} visual tokens; keep 1 to {N}")
        if pruner == "none" and K not in (None, N):
            raise UserError(f"none keeps all {N} visual tokens, not {K}; name another pruner")
        if pruner != "attention_pool":
            return N if K is None else K
        if trained is None:
            raise UserError(f"{pruner} is learned, and this model holds no weights for it")
        if K not in (None, trained, N):
            raise UserError(f"this model's {pruner} keeps {trained} tokens, not {K}")
        return trained if K is None else K
