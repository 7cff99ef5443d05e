"""Visual rows that leave between the language model's layers, one prompt at a time.

Attention is computed whole here, so that what the product takes from single rows can
be held against it.

Shapes: n visual tokens of an image, K kept, L rows of the prompt, T of them words, D features,
H heads, G key/value heads, d head size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pruners import Reduction, Signals, Step
from ..pruners.chain import choose
from .language.twig import Twig
from .splice import Spliced, outside


@dataclass(frozen=True)
class PromptRows:
    """The rows of one prompt at the input of a layer."""

    x_1LD: Tensor
    position_1L: Tensor
    next: int  # the position of the next token
    runs: list[tuple[int, int]]  # (start, n) of each image
    bias_L: Tensor  # added to the attention a row gets
    first_bias_L: Tensor | None = None  # in the first layer, in place of `bias_L`
    distance_P: Tensor | None = None  # what rows add for one so far before them, while read
    ranks: tuple[Tensor, ...] = ()  # of each image, where a step asks for it, `cls_rank_BN` (n,)

    @classmethod
    def of(cls, spliced: Spliced, b: int) -> "PromptRows":
        """The b-th of several, without its padding."""
        real_L = spliced.real_BL[b]
        x_BLD, position_BL = spliced.embeds_BLD, spliced.positions_BL
        x_1LD, position_1L = x_BLD[b, real_L][None], position_BL[b, real_L][None]
        prompt = cls(
            x_1LD, position_1L, int(spliced.next_B[b]), spliced.runs[b], spliced.bias_BL[b, real_L]
        )
        if spliced.rank_IK is not None:
            first = sum(map(len, spliced.runs[:b]))
            images = slice(first, first + len(spliced.runs[b]))
            prompt = replace(prompt, ranks=tuple(spliced.rank_IK[images]))
        if spliced.first_bias_BL is None or spliced.distance_BP is None:
            return prompt
        first_L, distance_P = spliced.first_bias_BL[b, real_L], spliced.distance_BP[b]
        return replace(prompt, first_bias_L=first_L, distance_P=distance_P)

    @property
    def words(self) -> list[int]:
        return outside(self.runs, self.x_1LD.shape[1])

    def words_after(self, image: int) -> list[int]:
        """Those after an image; of one at the end, all."""
        end = sum(self.runs[image])
        return [i for i in self.words if i >= end] or self.words


@dataclass
class PromptCache:
    """A prompt that was read, and what later tokens add to it."""

    hidden_1LD: Tensor  # after the last layer
    layers: list[list[Tensor]] = field(default_factory=list)  # keys and values of each
    biases: list[Tensor] = field(default_factory=list)
    next: list[int] = field(default_factory=list)  # the next position in each layer
    reductions: list[tuple[int, list[Reduction]]] = field(default_factory=list)  # by layer
    observed: PromptRows | None = None  # the input of the observed layer

    def read_layer(self, language: Any, i: int, prompt: PromptRows) -> PromptRows:
        """The prompt through the next layer of a language model or a twig, whose rows are kept."""
        rows: list[Tensor] = []
        bias_L = prompt.bias_L
        if i == 0 and prompt.first_bias_L is not None:
            bias_L = prompt.first_bias_L
        mask_LL = causal_mask(prompt.x_1LD.shape[1], prompt.x_1LD.device) + bias_L
        if prompt.distance_P is not None:
            position_L = prompt.position_1L[0]
            mask_LL += prompt.distance_P[(position_L[:, None] - position_L).clamp(min=0)]
        rotary = language.rotary(prompt.position_1L)
        x_1LD = language.layers[i](prompt.x_1LD, rotary, mask_LL[None, None], rows)
        self.layers.append(rows)
        later = prompt.distance_P is None  # do later tokens add to it, too?
        self.biases.append(prompt.bias_L if later else torch.zeros_like(prompt.bias_L))
        self.next.append(prompt.next)
        return replace(prompt, x_1LD=x_1LD)


@dataclass(frozen=True)
class Cuts:
    """Where visual rows leave: from a layer on, `schedule[layer]` of each image stay."""

    step: Step | None = None
    schedule: Mapping[int, int] = field(default_factory=dict)
    policy: str = "keep"
    enhancer: Step | None = None  # adds to attention
    completing: Step | None = None  # chooses some of the slots


def read_prompt(
    language: Any, prompt: PromptRows, grid: tuple[int, int], cuts: Cuts, observe: int | None = None
) -> PromptCache:
    """All layers, with fewer rows after each cut; the input of the layer `observe` is noted."""
    entry = prompt
    prompt = replace(prompt, bias_L=prompt.bias_L + entry_bias(prompt, grid, cuts))
    before, cache = prompt, PromptCache(prompt.x_1LD)
    for i in range(len(language.layers)):
        if i == observe:
            cache.observed = prompt
        if cuts.step and i in cuts.schedule:
            kept = [
                choose(replace(cuts.step, weights=None), image, cuts.schedule[i], cuts.completing)
                for image in signals(language, i, (entry, before, prompt), grid, cuts.step.weights)
            ]
            prompt = drop_rows(prompt, kept, cuts)
            cache.reductions.append((i, kept))
        before, prompt = prompt, cache.read_layer(language, i, prompt)
    cache.hidden_1LD = language.norm(prompt.x_1LD)
    return cache


def entry_bias(prompt: PromptRows, grid: tuple[int, int], cuts: Cuts) -> Tensor:
    """What a step adds, till its cut, to the attention that rows get, (L,)."""
    bias_L = torch.zeros_like(prompt.bias_L)
    if cuts.step is None or "entry_bias" not in vars(cuts.step.method) or not cuts.schedule:
        return bias_L
    left = cuts.schedule[min(cuts.schedule)]
    for start, n in prompt.runs:
        if left < n:
            x_1nD = prompt.x_1LD[:, start : start + n].cpu()
            image = Signals(x_1nD, grid, entrance_BND=x_1nD)
            bias_L[start : start + n] = cuts.step.call("entry_bias", image, left)[0].to(bias_L)
    return bias_L


def step(language: Any, cache: PromptCache, token: int) -> Tensor:
    """Scores (1, V) after one more token."""
    x_11D = language.embed_tokens(torch.tensor([[token]], device=cache.hidden_1LD.device))
    x_11D = run_layers(language, cache, range(len(language.layers)), x_11D)
    return language.logits(language.norm(x_11D))[:, 0]


def run_layers(language: Any, cache: PromptCache, numbers: range, x_1nD: Tensor) -> Tensor:
    """n more tokens through some layers of a language model or a twig."""
    n, device = x_1nD.shape[1], x_1nD.device
    for i in numbers:
        position_1n = cache.next[i] + torch.arange(n, device=device)[None]
        cache.biases[i] = F.pad(cache.biases[i], (0, n))
        mask_nS = causal_mask(len(cache.biases[i]), device)[-n:] + cache.biases[i]
        rotary, rows = language.rotary(position_1n), cache.layers[i]
        x_1nD = language.layers[i](x_1nD, rotary, mask_nS[None, None], rows)
        cache.next[i] += n
    return x_1nD


def rewind(cache: PromptCache, n: int) -> None:
    """Forget the last n tokens, in all layers."""
    for i, rows in enumerate(cache.layers):
        rows[:] = [held[:, :, : held.shape[2] - n] for held in rows]
        cache.biases[i] = cache.biases[i][: len(cache.biases[i]) - n]
        cache.next[i] -= n


def drop_rows(prompt: PromptRows, kept: list[Reduction], cuts: Cuts) -> PromptRows:
    """Each image's rows replaced by its kept ones."""
    xs, positions, biases, runs, cursor, length = [], [], [], [], 0, 0
    for (start, n), reduction in zip(prompt.runs, kept, strict=True):
        words, image = slice(cursor, start), slice(start, start + n)
        assert reduction.index_BK is not None
        K = reduction.index_BK.shape[1]
        xs += [prompt.x_1LD[:, words], reduction.tokens(prompt.x_1LD[:, image])]
        positions += [
            prompt.position_1L[:, words],
            prompt.position_1L[:, image].take_along_dim(reduction.index_BK, dim=1),
        ]
        biases += [prompt.bias_L[words], kept_bias(prompt, image, reduction, cuts)]
        length += start - cursor
        runs.append((length, K))
        length, cursor = length + K, start + n
    x_1LD = torch.cat([*xs, prompt.x_1LD[:, cursor:]], dim=1)
    position_1L = torch.cat([*positions, prompt.position_1L[:, cursor:]], dim=1)
    bias_L = torch.cat([*biases, prompt.bias_L[cursor:]])
    ranks = tuple(
        rank_n[reduction.index_BK[0]]
        for rank_n, reduction in zip(prompt.ranks, kept, strict=bool(prompt.ranks))
        if reduction.index_BK is not None
    )
    if cuts.policy == "renumber":  # so that the position after them stays
        count = x_1LD.shape[1]
        position_1L = (torch.arange(count) + prompt.next - count)[None].to(x_1LD.device)
    return PromptRows(x_1LD, position_1L, prompt.next, runs, bias_L, ranks=ranks)


def kept_bias(prompt: PromptRows, image: slice, kept: Reduction, cuts: Cuts) -> Tensor:
    """What is added to the attention that an image's kept rows get, (K,)."""
    assert cuts.step and kept.index_BK is not None
    bias_1n = prompt.bias_L[None, image]
    bias_1K = bias_1n.take_along_dim(kept.index_BK, dim=1)
    if cuts.enhancer and kept.index_BK.shape[1]:
        image_signals = Signals(prompt.x_1LD[:, image].cpu(), (1, image.stop - image.start))
        added_1K = cuts.enhancer.call("attention_bias", image_signals, kept.to("cpu"))
        bias_1K = bias_1K + added_1K.to(bias_1K)
    elif cuts.step.merges and kept.weight_BKN is not None:
        bias_1K = ((kept.weight_BKN > 0).float() @ bias_1n.exp()[..., None])[..., 0].log()
    return bias_1K[0]


def signals(
    language: Any, i: int, rows: tuple[PromptRows, PromptRows, PromptRows], grid: tuple[int, int],
    twig: Twig | None = None,
) -> list[Signals]:  # fmt: skip
    """All signals of each image at the input of layer i, on which a twig may grow. `rows` are the
    inputs of layers 0, i - 1 and i."""
    entry, before, now = rows
    normed_1LD = language.norm(now.x_1LD)
    images = [slice(start, start + n) for start, n in now.runs]
    of_images = (
        attention_signals(language, i, before, now, twig)
        if language.attends
        else [{}] * len(images)
    )
    return [
        Signals(
            now.x_1LD[:, image],
            grid,
            cls_rank_BN=now.ranks[j][None] if now.ranks else None,
            entrance_BND=entry.x_1LD[:, entry.runs[j][0] : sum(entry.runs[j])],
            before_BND=before.x_1LD[:, image],
            normed_BND=normed_1LD[:, image],
            text_BTD=normed_1LD[:, now.words_after(j)],
            text_real_BT=torch.ones(1, len(now.words_after(j)), dtype=torch.bool),
            text_share_BT=text_share(entry, j),
            **attention_of,
        )
        for j, (image, attention_of) in enumerate(zip(images, of_images, strict=True))
    ]


def text_share(entry: PromptRows, image: int) -> Tensor:
    """Of the words after an image the shares of a softmax over them, the mean over its tokens."""
    start, n = entry.runs[image]
    x_LD = entry.x_1LD[0].float()
    logits_NT = x_LD[start : start + n] @ x_LD[entry.words_after(image)].T
    return logits_NT.softmax(dim=-1).mean(dim=0)[None]


def attention_signals(
    language: Any, i: int, before: PromptRows, now: PromptRows, twig: Twig | None
) -> list[dict[str, Any]]:
    """The signals that attention gives of each image there."""
    last, this = language.layers[i - 1], language.layers[i]
    _, held_GLd, last_LL = attention(language, last, before)
    _, k_GLd, next_LL = attention(language, this, now)
    q0_HLd, k0_GLd = this.rotated(now.x_1LD, language.rotary(now.position_1L * 0))  # not at all
    twig_LL = torch.zeros_like(next_LL) if twig is None else twig_attention(twig, now)
    values_LGd = last.values(before.x_1LD, language.rotary(before.position_1L))
    cosine_1L, sine_1L = mean_rotation(language, now.position_1L)
    held_LD, next_LD = (k.transpose(0, 1).flatten(1) for k in (held_GLd, k_GLd))
    of_images, ahead = [], slice(0, sum(now.runs[-1]) if now.runs else 0)
    prompt_1m = mean_query_attention(q0_HLd[:, ahead], k0_GLd[:, ahead])
    for j, (start, n) in enumerate(now.runs):
        image, words = slice(start, start + n), now.words_after(j)
        of_images.append(
            {
                "keys_BND": held_LD[None, image],
                "text_keys_BTD": held_LD[None, words],
                "held_values_BNHd": values_LGd[None, image],
                "text_values_BTHd": values_LGd[None, words],
                "rotary_cosine_BN": cosine_1L[:, image],
                "rotary_sine_BN": sine_1L[:, image],
                "next_keys_BND": next_LD[None, image],
                "last_attention_BN": last_LL[None, -1, image],
                "text_attention_BTN": last_LL[None, words][:, :, image],
                "next_attention_BN": next_LL[None, -1, image],
                "mean_attention_BN": mean_query_attention(q0_HLd[:, image], k0_GLd[:, image]),
                "prompt_attention_BN": prompt_1m[:, image],
                "twig_attention_BN": twig_LL[None, -1, image],
            }
        )
    return of_images


def mean_rotation(language: Any, positions_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The means over frequencies of the cosines and of the sines of positions, (B, L) each."""
    cos, sin = (x.mean(dim=-1).reshape(positions_BL.shape) for x in language.rotary(positions_BL))
    return cos, sin


def with_rotation(
    language: Any, signals: Signals, prompts: Sequence[Any], kept: Reduction | None
) -> Signals:
    """With what the language model's rotation makes of the positions of images in prompts."""
    if not language.attends:
        return signals
    images, n, _ = signals.x_BND.shape
    index_IN = torch.arange(n, device=signals.x_BND.device).expand(images, n)
    if kept and kept.index_BK is not None:
        index_IN = kept.index_BK
    starts = [start for prompt in prompts for start, _ in prompt.runs]
    position_IN = torch.tensor(starts, device=index_IN.device)[:, None] + index_IN
    cosine_IN, sine_IN = mean_rotation(language, position_IN)
    return signals.replace(rotary_cosine_BN=cosine_IN, rotary_sine_BN=sine_IN)


def mean_query_attention(q_Hnd: Tensor, k_Gnd: Tensor) -> Tensor:
    """What the mean query attends to, mean over heads, (1, n)."""
    k_Hnd = k_Gnd.repeat_interleave(len(q_Hnd) // len(k_Gnd), dim=0)
    logits_H1n = q_Hnd.mean(dim=1, keepdim=True) @ k_Hnd.mT / q_Hnd.shape[-1] ** 0.5
    return logits_H1n.softmax(-1).mean(dim=0)


def attention(layers: Any, layer: Any, prompt: PromptRows) -> tuple[Tensor, Tensor, Tensor]:
    """Rotated queries (H, L, d) and keys (G, L, d), and who attends to whom (L, L), mean over
    heads."""
    q_HLd, k_GLd = layer.rotated(prompt.x_1LD, layers.rotary(prompt.position_1L))
    k_HLd = k_GLd.repeat_interleave(len(q_HLd) // len(k_GLd), dim=0)
    logits_HLL = (q_HLd @ k_HLd.mT).float() / q_HLd.shape[-1] ** 0.5
    logits_HLL = logits_HLL + causal_mask(q_HLd.shape[1], q_HLd.device) + prompt.bias_L
    return q_HLd, k_GLd, logits_HLL.softmax(-1).mean(dim=0)


def twig_attention(twig: Twig, prompt: PromptRows) -> Tensor:
    """Who attends to whom in a twig's last layer (L, L), mean over heads."""
    cache, last = PromptCache(prompt.x_1LD), len(twig.layers) - 1
    for i in range(last):
        prompt = cache.read_layer(twig, i, prompt)
    return attention(twig, twig.layers[last], prompt)[2]


def causal_mask(L: int, device: torch.device) -> Tensor:
    """0 where a row sees another, minus infinity where not, (L, L)."""
    return torch.full((L, L), -torch.inf, device=device).triu(1)
