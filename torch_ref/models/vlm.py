"""MiniMind-V: encode, prune, project, splice, decode, in PyTorch.

Module names are those of the published .pth and of Hugging Face's CLIP or SigLIP folder;
`tower`, `projector` and `language` are what the parts are.

Shapes: B prompts, I images over all prompts, N visual tokens, K kept, L tokens,
S tokens with those decoded, D features, V words.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mlx_vlm_prune.checkpoints.command_line import either
from mlx_vlm_prune.checkpoints.config import CLIPConfig, MlxLmConfig, VLMConfig
from mlx_vlm_prune.checkpoints.errors import UserError

from ..pruners import (
    METHODS,
    Reduction,
    Signals,
    Step,
    entry,
    is_learned,
    probed,
    signal_layers,
)
from ..pruners.attention_pool import AttentionPool
from ..pruners.chain import adding, choose, completing, selecting
from . import decoder
from .language.minimind import MiniMind
from .projector import merge_patches, vision_proj
from .splice import (
    Prompt,
    Spliced,
    added_bias,
    calibrated,
    outside,
    splice,
    visible,
    with_ranks,
)
from .towers.vit import VisionTower


@dataclass
class Prefill:
    """Prompts that were read, and what a step of decoding continues from; every step changes it."""

    hidden_BLD: Tensor  # of the prompts, padded on the left
    logits_BV: Tensor  # of the next token
    real_BS: Tensor
    next_B: Tensor
    cache: list[list]
    each: list[decoder.PromptCache] = field(default_factory=list)  # where read one by one


class VisionEncoder(nn.Module):
    """The tower under its published name."""

    def __init__(self, c: CLIPConfig):
        super().__init__()
        self.vision_model = VisionTower(c)


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
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def feature_dims(self) -> int:
        """Of a visual token before the projector."""
        return self.config.vision.hidden_size * prod(self.config.merge)

    @property
    def pool(self) -> AttentionPool | None:
        """The learned pruner's weights, where the checkpoint has some."""
        return self.vision_proj if isinstance(self.vision_proj, AttentionPool) else None

    def logits(self, *arguments: Any, **options: Any) -> Tensor:
        """Scores (B, L, V) after every token of the pruned prompts, padded on the left.
        Arguments as of `embed`."""
        prefill = self.prefill(*self.embed(*arguments, **options))
        return self.language.logits(prefill.hidden_BLD)

    def embed(
        self,
        prompts: Sequence[Prompt],
        pixels_I3HW: Tensor | None,
        pruner: str | Sequence[Step] = "none",
        K: int | None = None,
        positions: str = "keep",
        options: Mapping[str, Any] | None = None,
    ) -> tuple[Spliced, decoder.Cuts]:
        """Encode, prune, project, splice; and what is left to do in the decoder.

        `pixels_I3HW` are the images of all prompts, in order. K is how many visual tokens
        of each image stay; without it all do, or as many as a learned pruner was
        trained for. `positions` is "keep" or "renumber". `options` are the pruner's.
        Raises UserError for what does not fit.
        """
        if positions not in ("keep", "renumber"):
            raise UserError(f"positions are keep or renumber, not {positions!r}")
        steps = self.pruning_steps(pruner, K, options)
        embed, images = self.language.embed_tokens, 0 if pixels_I3HW is None else len(pixels_I3HW)
        runs = [run for prompt in prompts for run in prompt.runs]
        if len(runs) != images:
            raise UserError(f"the prompts place {len(runs)} images, and {images} are given")
        assert all(length == self.N for _, length in runs), f"an image is {self.N} placeholders"
        if pixels_I3HW is None or not images:
            return splice(embed, prompts, None, None, positions), decoder.Cuts()
        encoded, kept = self.encode(pixels_I3HW.to(embed.weight), steps, prompts)
        visual_IKD, kept_of_encoded = self.prune(encoded, steps)
        enhancer = adding(steps)
        step = next((step for step in steps if step.stage == "decoder"), None)
        bias_IK = added_bias(enhancer, encoded, kept_of_encoded)
        kept = kept_of_encoded.after(kept, self.N)
        positions = "renumber" if kept.index_BK is None else positions  # pooled slots stand nowhere
        spliced = splice(embed, prompts, visual_IKD, kept, positions, bias_IK)
        spliced = calibrated(spliced, enhancer, encoded.x_BND.shape[1])
        spliced = with_ranks(spliced, step, encoded, kept_of_encoded)
        if step is None or step.K in (None, visual_IKD.shape[1]):
            return spliced, decoder.Cuts()
        schedule = step.call("schedule", len(self.language.layers), visual_IKD.shape[1], step.K)
        return spliced, decoder.Cuts(step, schedule, positions, enhancer, completing(steps))

    def encode(
        self, pixels_I3HW: Tensor, steps: Sequence[Step], prompts: Sequence[Prompt]
    ) -> tuple[Signals, Reduction | None]:
        """The tower, ahead of which pictures may shrink and inside which tokens may leave."""
        kept, cuts, n = None, list[tuple[int, str, int, Step]](), self.N
        want: dict[str, int | None] = {}
        layers, last = self.config.vision.depth, selecting(steps)[-1]
        for step in steps:
            K = n if step.K is None else step.K
            if step.stage == "image" and n > K:
                grid = step.call("smaller_grid", self.grid, K)
                pixels_I3HW = self.shrink_pixels(pixels_I3HW, grid)
                means = step.call("block_means", self.grid, grid, len(pixels_I3HW))
                kept, n = means.to(pixels_I3HW.device), prod(grid)
            elif step.stage == "encoder" and n > K:
                planned = step.call("cuts", layers, n, K)
                if entry(step.method, "give_back") and step is not last:
                    step, K = replace(step, gives_back=True), n
                cuts += [(layer, place, left, step) for layer, place, left in planned]
                n = K
            if step.stage not in ("enhancer", "image"):
                want |= signal_layers(step, layers, self.config.vision.layers_behind)
        if adding(steps) and cuts:
            want["represented"] = None
        assert not cuts or self.config.merge == (1, 1), "patches that merge must all be there"
        encoded = self.tower(pixels_I3HW, want, cuts)
        kept = encoded.kept.after(kept, self.N) if encoded.kept else kept
        signals = self.add_text(merge_patches(encoded.signals, self.config.merge), prompts)
        return decoder.with_rotation(self.language, signals, prompts, kept), kept

    def shrink_pixels(self, pixels_I3HW: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pictures of which the tower makes a smaller grid of visual tokens."""
        patch, (down, across) = self.config.vision.patch_size, self.config.merge
        size = (grid[0] * down * patch, grid[1] * across * patch)
        return F.interpolate(pixels_I3HW, size, mode="bilinear", antialias=True)

    def add_text(self, signals: Signals, prompts: Sequence[Prompt]) -> Signals:
        """With the embeddings of the words around each image."""
        embed, words = self.language.embed_tokens, []
        for prompt in prompts:
            ids = [prompt.ids[i] for i in outside(prompt.runs, len(prompt.ids))]
            words += [torch.tensor(ids, device=embed.weight.device)] * len(prompt.runs)
        text_BTD = pad_sequence([embed(ids) for ids in words], True)
        real_BT = pad_sequence([torch.ones_like(ids) for ids in words], True).bool()
        return signals.replace(text_BTD=text_BTD, text_real_BT=real_BT)

    def prune(self, encoded: Signals, steps: Sequence[Step]) -> tuple[Tensor, Reduction]:
        """Projected tokens after the steps at the end of the tower and after the projector."""
        signals, (images, n, _) = encoded, encoded.x_BND.shape
        last = selecting(steps)[-1]
        index_N = torch.arange(n, device=encoded.x_BND.device)
        kept_of_encoded = Reduction(index_N.expand(images, n))
        for stage in ("features", "projected"):
            if stage == "projected":
                features_BND = signals.x_BND
                signals = signals.replace(
                    x_BND=self.projector(features_BND), features_BND=features_BND,
                    sensitivity_BN=probed(steps, self.projector, features_BND),
                )  # fmt: skip
            for step in steps:
                if step.stage == stage:
                    N = signals.x_BND.shape[1]
                    K = N if step.K is None else min(step.K, N)
                    K = min(step.one_budget(signals, encoded, K), N)
                    kept = choose(step, signals, K, completing(steps) if step is last else None)
                    slots = kept.tokens(signals.x_BND)
                    signals = signals if kept.index_BK is None else signals.take(kept.index_BK)
                    signals = signals.replace(x_BND=slots)
                    kept_of_encoded = kept.after(kept_of_encoded, n)
        return signals.x_BND, kept_of_encoded

    def prefill(self, spliced: Spliced, cuts: decoder.Cuts) -> Prefill:
        """Read the prompts that `embed` gave into a cache.

        They are read one by one where layers hold different rows, or rows count differently.
        """
        each: list[decoder.PromptCache] = []
        cache: list[list] = []
        if cuts.step is not None or spliced.adds_to_attention:
            each = self.read_each(spliced, cuts)
            hidden = [prompt.hidden_1LD[0] for prompt in each]
            hidden_BLD = pad_sequence(hidden, batch_first=True, padding_side="left")
        else:
            cache += [[] for _ in self.language.layers]
            visible_BLL = visible(spliced.real_BL)
            embeds_BLD, positions_BL = spliced.embeds_BLD, spliced.positions_BL
            hidden_BLD = self.language(embeds_BLD, positions_BL, visible_BLL, cache)
        logits_BV = self.language.logits(hidden_BLD[:, -1])
        return Prefill(hidden_BLD, logits_BV, spliced.real_BL, spliced.next_B, cache, each)

    def read_each(self, spliced: Spliced, cuts: decoder.Cuts) -> list[decoder.PromptCache]:
        """Through the layers, prompt by prompt."""
        prompts = [decoder.PromptRows.of(spliced, b) for b in range(len(spliced.runs))]
        return [decoder.read_prompt(self.language, rows, self.grid, cuts) for rows in prompts]

    def step(self, prefill: Prefill, token_B: Tensor) -> None:
        """Read one token per prompt; `prefill.logits_BV` then scores the one after it."""
        if prefill.each:
            pairs = zip(prefill.each, token_B.tolist(), strict=True)
            logits = [decoder.step(self.language, prompt, token) for prompt, token in pairs]
            prefill.logits_BV = torch.cat(logits)
            return
        is_real_B1 = torch.ones_like(prefill.real_BS[:, :1])
        prefill.real_BS = torch.cat([prefill.real_BS, is_real_B1], dim=1)
        embeds_B1D = self.language.embed_tokens(token_B[:, None])
        hidden_B1D = self.language(
            embeds_B1D, prefill.next_B[:, None], prefill.real_BS[:, None], prefill.cache
        )
        prefill.next_B = prefill.next_B + 1  # not the cache's length: pruned rows are not in it
        prefill.logits_BV = self.language.logits(hidden_B1D[:, 0])

    @torch.no_grad()
    def generate(
        self, spliced: Spliced, cuts: decoder.Cuts, max_tokens: int = 64,
        ends: Collection[int] = (),
    ) -> list[list[int]]:  # fmt: skip
        """The most likely next token of prompts that `embed` gave, again and again: new ids per
        prompt, without the token of `ends`, or the model's own, that ended them."""
        ends = ends or (self.eos_token_id,)
        prefill = self.prefill(spliced, cuts)
        answers: list[list[int]] = [[] for _ in spliced.runs]
        running = list(range(len(answers)))
        for i in range(max_tokens):
            token_B = prefill.logits_BV.argmax(-1)
            chosen = token_B.tolist()
            running = [b for b in running if chosen[b] not in ends]
            for b in running:
                answers[b].append(chosen[b])
            if not running or i == max_tokens - 1:
                break
            self.step(prefill, token_B)
        return answers

    @property
    def N(self) -> int:
        """Visual tokens of one image."""
        return self.config.N

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens."""
        return self.config.grid

    def pruning_steps(
        self, pruner: str | Sequence[Step], K: int | None, options: Mapping[str, Any] | None
    ) -> Sequence[Step]:
        """The steps of a chain, or the one that a name, a budget and options stand for."""
        if isinstance(pruner, str):
            pruner = [Step(pruner, self.budget(pruner, K), dict(options or {}))]
        return [replace(step, weights=self.weights(step.name)) for step in pruner]

    def weights(self, pruner: str) -> Any:
        """Of a learned method, from the checkpoint or from beside it; else None."""
        pool = self.pool if pruner == "attention_pool" else None
        return self.learned.get(pruner) if pool is None else pool

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
