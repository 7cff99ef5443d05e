"""MiniMind-V: encode, prune, project, splice, decode, in PyTorch.

Module names are those of the published .pth and of Hugging Face's CLIP or SigLIP folder;
`tower`, `projector` and `language` are what the parts are.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept, L tokens,
S tokens with those decoded, D features, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mlx_vlm_prune.checkpoints.command_line import either
from mlx_vlm_prune.checkpoints.config import MlxLmConfig, VLMConfig, parse_sizes
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.minimind.published import read_published, torch_tensors
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor

from ..pruners import METHODS, Reduction, Signals, Step, is_learned, reduce, signal_layers
from ..pruners.attention_pool import AttentionPool
from . import decoder
from .language.minimind import MiniMind
from .published import VisionEncoder, merged, vision_proj
from .splice import Row, Spliced, splice, visible
from .towers.vit import VisionTower


def best_device() -> torch.device:
    """CUDA, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass
class Decoding:
    """What a step of decoding continues from; every step changes it."""

    cache: list[list]
    real_BS: Tensor
    next_B: Tensor
    logits_BV: Tensor  # of the next token
    each: list[decoder.Cached] = field(default_factory=list)  # prompts that were read one by one


def _tensor(raw: RawTensor) -> Tensor:
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return torch.from_numpy(np.array(raw.data)).view(kinds[raw.dtype]).reshape(raw.shape)


def one_by_one(spliced: Spliced, plan: decoder.Plan) -> bool:
    """Must prompts be read one at a time, because layers differ or rows count differently?"""
    return plan.step is not None or bool(spliced.bias_BL.any())


class VLM(nn.Module):
    """A MiniMind-V."""

    model: Any

    def __init__(self, config: VLMConfig, published: Mapping[str, Any] | None = None):
        """`published` is the text_config of a LLaVA whose language model is transformers'."""
        super().__init__()
        self.eos_token_id = 2
        self.config: Any = config  # whose language model may be one of transformers'
        if isinstance(config.text, MlxLmConfig):
            from .language.transformers import TextModel

            assert published is not None
            self.model = TextModel(config.text, published)
        else:
            self.model = MiniMind(config.text)
        self.vision_proj = vision_proj(config)
        self.vision_encoder = VisionEncoder(config.vision)
        # Weights of learned methods that were trained beside a model, by name: none of its own.
        self.learned: dict[str, Any] = {}

    @classmethod
    def from_pth(
        cls, path: str | Path, clip_folder: str | Path, device: torch.device | None = None
    ) -> "VLM":
        """MiniMind-V of any supported release: a .pth, and the folder of its tower.

        In float32, ready to answer, on the best device unless one is given. Raises
        UserError for files that cannot be read or that hold another model.
        """
        published = read_published(Path(path), Path(clip_folder))
        config = parse_sizes(published.sizes, Path(path))
        model = cls(config)
        prefix = {True: "vision_encoder.", False: ""}
        state = {
            prefix[name.startswith("vision_model.")] + name: _tensor(raw)
            for name, raw in torch_tensors(published, config.text.head_dim).items()
        }
        model.load_state_dict(state)
        return model.eval().to(device or best_device())

    @property
    def tower(self) -> VisionTower:
        return self.vision_encoder.vision_model

    @property
    def projector(self) -> nn.Module:
        return getattr(self.vision_proj, "mlp" if self.config.projector else "vision_proj")

    @property
    def language(self) -> Any:
        return self.model

    @property
    def pool(self) -> AttentionPool | None:
        """The learned pruner's weights, where the checkpoint has some."""
        return self.vision_proj if isinstance(self.vision_proj, AttentionPool) else None

    def logits(
        self,
        rows: Sequence[Row],
        pixels_I3HW: Tensor | None,
        pruner: str | Sequence[Step] = "none",
        K: int | None = None,
        positions: str = "keep",
        options: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Scores (B, L, V) after every token of the pruned prompts, padded on the left.
        Arguments as of `read`."""
        spliced, plan = self.read(rows, pixels_I3HW, pruner, K, positions, options)
        if one_by_one(spliced, plan):
            hidden = [one.hidden_1LD[0].flip(0) for one in self.read_each(spliced, plan)]
            hidden_BLD = pad_sequence(hidden, batch_first=True).flip(1)
        else:
            hidden_BLD = self.language(
                spliced.embeds_BLD, spliced.positions_BL, visible(spliced.real_BL)
            )
        return self.language.logits(hidden_BLD)

    @torch.no_grad()
    def generate(
        self, spliced: Spliced, plan: decoder.Plan, max_tokens: int = 64
    ) -> list[list[int]]:
        """The most likely next token of prompts that `read` gave, again and again: new ids per
        row, without the end token."""
        state = self.prefill(spliced, plan)
        answers: list[list[int]] = [[] for _ in spliced.runs]
        running = list(range(len(answers)))
        for i in range(max_tokens):
            token_B = state.logits_BV.argmax(-1)
            chosen = token_B.tolist()
            running = [b for b in running if chosen[b] != self.eos_token_id]
            for b in running:
                answers[b].append(chosen[b])
            if not running or i == max_tokens - 1:
                break
            self.step(state, token_B)
        return answers

    def prefill(self, spliced: Spliced, plan: decoder.Plan) -> Decoding:
        """Read the prompts that `read` gave into a cache."""
        if one_by_one(spliced, plan):
            each = self.read_each(spliced, plan)
            last = [self.language.logits(one.hidden_1LD[:, -1]) for one in each]
            return Decoding([], spliced.real_BL, spliced.next_B, torch.cat(last), each)
        cache: list[list] = [[] for _ in self.language.layers]
        seen_BLL = visible(spliced.real_BL)
        hidden_BLD = self.language(spliced.embeds_BLD, spliced.positions_BL, seen_BLL, cache)
        logits_BV = self.language.logits(hidden_BLD[:, -1])
        return Decoding(cache, spliced.real_BL, spliced.next_B, logits_BV)

    def step(self, state: Decoding, token_B: Tensor) -> None:
        """Read one token per row; `state.logits_BV` then scores the one after it."""
        if state.each:
            pairs = zip(state.each, token_B.tolist(), strict=True)
            read = [decoder.step(self.language, one, token) for one, token in pairs]
            state.logits_BV = torch.cat(read)
            return
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
        pruner: str | Sequence[Step] = "none",
        K: int | None = None,
        positions: str = "keep",
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Spliced, decoder.Plan]:
        """Encode, prune, project, splice; and what is left to do in the decoder.

        `pixels_I3HW` are the images of all rows, in order. K is how many visual tokens
        of each image stay; without it all do, or as many as a learned pruner was
        trained for. `positions` is "keep" or "renumber". `options` are the pruner's.
        Raises UserError for what does not fit.
        """
        if positions not in ("keep", "renumber"):
            raise UserError(f"positions are keep or renumber, not {positions!r}")
        steps = self.steps(pruner, K, options)
        embed, images = self.language.embed_tokens, 0 if pixels_I3HW is None else len(pixels_I3HW)
        runs = [run for row in rows for run in row.runs]
        if len(runs) != images:
            raise UserError(f"the prompts place {len(runs)} images, and {images} are given")
        assert all(length == self.N for _, length in runs), f"an image is {self.N} placeholders"
        if pixels_I3HW is None or not images:
            return splice(embed, rows, None, None, positions), decoder.Plan()
        encoded, kept = self.encode(pixels_I3HW.to(embed.weight), steps, rows)
        visual_IKD, kept_of_encoded = self.reduce(encoded, steps)
        of_stage = {step.stage: step for step in steps}  # a chain has one of either
        enhancer, step = of_stage.get("enhancer"), of_stage.get("decoder")
        bias_IK = enhancer.call("attention_bias", encoded, kept_of_encoded) if enhancer else None
        kept = kept_of_encoded.after(kept, self.N)
        if kept.index_BK is None:
            positions = "renumber"  # pooled slots have no place of their own
        spliced = splice(embed, rows, visual_IKD, kept, positions, bias_IK)
        n = visual_IKD.shape[1]
        if step is None or step.K in (None, n):
            return spliced, decoder.Plan()
        schedule = step.call("schedule", len(self.language.layers), n, step.K)
        return spliced, decoder.Plan(step, schedule, positions, enhancer)

    def encode(
        self, pixels_I3HW: Tensor, steps: Sequence[Step], rows: Sequence[Row]
    ) -> tuple[Signals, Reduction | None]:
        """The tower, with the steps that work in front of it and inside."""
        grid, (down, across) = self.grid, self.config.merge
        patch = self.config.vision.patch_size
        layers, N, cuts, within = self.config.vision.depth, self.N, [], None
        want: dict[str, int | None] = {}
        for step in steps:
            K = N if step.K is None else step.K
            if step.stage == "image" and K < N:
                small = step.call("smaller_grid", grid, K)
                size = (small[0] * down * patch, small[1] * across * patch)
                pixels_I3HW = F.interpolate(pixels_I3HW, size, mode="bilinear", antialias=True)
                within, N = (
                    step.call("block_means", grid, small, len(pixels_I3HW)),
                    small[0] * small[1],
                )
            elif step.stage == "encoder" and K < N:
                planned = step.call("cuts", layers, N, K)
                cuts += [(layer, place, left, step) for layer, place, left in planned]
                N = K
            if step.stage not in ("decoder", "enhancer", "image"):
                want |= signal_layers(step, layers)
        assert not cuts or (down, across) == (1, 1), "patches that merge must all be there"
        encoded = self.tower(pixels_I3HW, want, cuts)
        signals = merged(encoded.signals, self.config.merge)
        kept = encoded.kept.after(within, self.N) if encoded.kept else within
        words = [self.words(row) for row in rows for _ in row.runs]
        text_BTD = pad_sequence([self.language.embed_tokens(ids) for ids in words], True)
        real_BT = pad_sequence([torch.ones_like(ids) for ids in words], True).bool()
        return signals.replace(text_BTD=text_BTD, text_real_BT=real_BT), kept

    def words(self, row: Row) -> Tensor:
        """The ids of a prompt without its images' placeholders."""
        inside = {i for start, length in row.runs for i in range(start, start + length)}
        ids = [token for i, token in enumerate(row.ids) if i not in inside]
        return torch.tensor(ids, device=self.language.embed_tokens.weight.device)

    def reduce(self, encoded: Signals, steps: Sequence[Step]) -> tuple[Tensor, Reduction]:
        """Projected tokens after the steps at the end of the tower and behind the projector."""
        signals, n = encoded, encoded.x_BND.shape[1]
        whole = Reduction(
            torch.arange(n, device=encoded.x_BND.device).expand(len(signals.x_BND), n)
        )
        done: Reduction | None = None
        for stage in ("features", "projected"):
            if stage == "projected":
                signals = signals.replace(x_BND=self.projector(signals.x_BND))
            for step in steps:
                if step.stage == stage:
                    N = signals.x_BND.shape[1]
                    K = N if step.K is None else min(step.K, N)
                    kept = reduce(step.name, signals, K, step.learned, **step.options)
                    slots = kept.tokens(signals.x_BND)
                    signals = signals if kept.index_BK is None else signals.take(kept.index_BK)
                    signals, done = signals.replace(x_BND=slots), kept.after(done, n)
        return signals.x_BND, done or whole

    def read_each(self, spliced: Spliced, plan: decoder.Plan) -> list[decoder.Cached]:
        """Through the layers, prompt by prompt."""
        prompts = [decoder.Prompt.of(spliced, b) for b in range(len(spliced.runs))]
        return [decoder.read(self.language, prompt, self.grid, plan) for prompt in prompts]

    @property
    def N(self) -> int:
        """Visual tokens of one image."""
        return self.config.N

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.config.grid

    def steps(
        self, pruner: str | Sequence[Step], K: int | None, options: Mapping[str, Any] | None
    ) -> Sequence[Step]:
        """The steps of a chain, or the one that a name, a budget and options stand for."""
        if isinstance(pruner, str):
            pruner = [Step(pruner, self.budget(pruner, K), dict(options or {}))]
        return [replace(step, learned=self.weights(step.name)) for step in pruner]

    def weights(self, pruner: str) -> Any:
        """Of a learned method, from the checkpoint or from beside it; else None."""
        return self.pool if pruner == "attention_pool" else self.learned.get(pruner)

    def budget(self, pruner: str, K: int | None) -> int:
        """How many of the N tokens a pruner shall keep; UserError where it cannot."""
        N, pooled = self.N, pruner == "attention_pool" and self.config.pruner
        trained = pooled[1] if pooled else None
        if pruner not in METHODS:
            nearest = either(get_close_matches(pruner, METHODS, n=3, cutoff=0))
            raise UserError(f"no pruner is called {pruner!r}; did you mean {nearest}?")
        if K is not None and not 1 <= K <= N:
            raise UserError(f"cannot keep {K} of {N} visual tokens; keep 1 to {N}")
        if pruner == "none" and K not in (None, N):
            raise UserError(f"none keeps all {N} visual tokens, not {K}; name another pruner")
        if is_learned(pruner) and self.weights(pruner) is None:
            raise UserError(f"{pruner} is learned, and this model holds no weights for it")
        if trained and K not in (None, trained, N):
            raise UserError(f"this model's {pruner} keeps {trained} tokens, not {K}")
        return (trained or N) if K is None else K
