"""Visual rows that leave between the language model's layers, one prompt at a time.

Attention is computed whole here, so that what the product takes from single rows can
be held against it.

Shapes: n visual tokens of an image, K kept, L rows of the prompt, T of them words, D features,
H heads, G key/value heads, d head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..pruners import Reduction, Signals, Step, reduce
from .language.twig import Twig
from .splice import Spliced


@dataclass(frozen=True)
class Prompt:
    """One prompt on its way through the layers."""

    x_1LD: Tensor
    position_1L: Tensor
    after: int  # the position of the next token
    runs: list[tuple[int, int]]  # (start, n) of each image
    bias_L: Tensor  # added to the attention a row gets

    @classmethod
    def of(cls, spliced: Spliced, b: int) -> "Prompt":
        """The b-th of several, without its padding."""
        real_L = spliced.real_BL[b]
        x_BLD, position_BL = spliced.embeds_BLD, spliced.positions_BL
        x_1LD, position_1L = x_BLD[b, real_L][None], position_BL[b, real_L][None]
        after = int(spliced.next_B[b])
        return cls(x_1LD, position_1L, after, spliced.runs[b], spliced.bias_BL[b, real_L])

    @property
    def words(self) -> list[int]:
        seen = {i for start, n in self.runs for i in range(start, start + n)}
        return [i for i in range(self.x_1LD.shape[1]) if i not in seen]


@dataclass
class Cached:
    """A prompt that was read, and what later tokens add to it."""

    hidden_1LD: Tensor  # after the last layer
    rows: list[list[Tensor]] = field(default_factory=list)  # keys and values of each layer
    biases: list[Tensor] = field(default_factory=list)
    after: list[int] = field(default_factory=list)  # the next position in each layer
    cuts: list[tuple[int, list[Reduction]]] = field(default_factory=list)
    fork: Prompt | None = None  # as it came to the layer that was asked for

    def through(self, layers: Any, i: int, prompt: Prompt) -> Prompt:
        """The prompt through the next layer of a language model or a twig, whose rows it leaves."""
        rows: list[Tensor] = []
        mask_LL = causal(prompt.x_1LD.shape[1], prompt.x_1LD.device) + prompt.bias_L
        rotary = layers.rotary(prompt.position_1L)
        x_1LD = layers.layers[i](prompt.x_1LD, rotary, mask_LL[None, None], rows)
        self.rows.append(rows)
        self.biases.append(prompt.bias_L)
        self.after.append(prompt.after)
        return replace(prompt, x_1LD=x_1LD)


@dataclass(frozen=True)
class Plan:
    """Where a step leaves how many tokens of each image, and what makes it better."""

    step: Step | None = None
    schedule: Mapping[int, int] = field(default_factory=dict)
    policy: str = "keep"
    enhancer: Step | None = None


def read(
    language: Any, prompt: Prompt, grid: tuple[int, int], plan: Plan, fork: int | None = None
) -> Cached:
    """All layers, with fewer rows after each cut; as the rows came to the layer `fork`, they are
    handed out."""
    before, done = prompt, Cached(prompt.x_1LD)
    for i in range(len(language.layers)):
        if i == fork:
            done.fork = prompt
        if plan.step and i in plan.schedule:
            kept = [
                reduce(plan.step.name, image, plan.schedule[i], **plan.step.options)
                for image in signals(language, i, before, prompt, grid, plan.step.learned)
            ]
            prompt = shorten(prompt, kept, plan)
            done.cuts.append((i, kept))
        before, prompt = prompt, done.through(language, i, prompt)
    done.hidden_1LD = language.norm(prompt.x_1LD)
    return done


def step(language: Any, done: Cached, token: int) -> Tensor:
    """Scores (1, V) after one more token."""
    x_11D = language.embed_tokens(torch.tensor([[token]], device=done.hidden_1LD.device))
    x_11D = onward(language, done, range(len(language.layers)), x_11D)
    return language.logits(language.norm(x_11D))[:, 0]


def onward(layers: Any, done: Cached, numbers: range, x_1nD: Tensor) -> Tensor:
    """n more tokens through some layers of a language model or a twig."""
    n, device = x_1nD.shape[1], x_1nD.device
    for i in numbers:
        place_1n = done.after[i] + torch.arange(n, device=device)[None]
        done.biases[i] = F.pad(done.biases[i], (0, n))
        mask_nS = causal(len(done.biases[i]), device)[-n:] + done.biases[i]
        rotary, rows = layers.rotary(place_1n), done.rows[i]
        x_1nD = layers.layers[i](x_1nD, rotary, mask_nS[None, None], rows)
        done.after[i] += n
    return x_1nD


def forget(done: Cached, n: int) -> None:
    """The last n tokens, in all layers."""
    for i, rows in enumerate(done.rows):
        rows[:] = [held[:, :, : held.shape[2] - n] for held in rows]
        done.biases[i] = done.biases[i][: len(done.biases[i]) - n]
        done.after[i] -= n


def shorten(prompt: Prompt, kept: list[Reduction], plan: Plan) -> Prompt:
    """Each image's rows replaced by its kept ones."""
    assert plan.step
    xs, places, biases, runs, cursor, length = [], [], [], [], 0, 0
    for (start, n), one in zip(prompt.runs, kept, strict=True):
        words, image = slice(cursor, start), slice(start, start + n)
        assert one.index_BK is not None
        bias_1n = prompt.bias_L[None, image]
        own_1K = bias_1n.take_along_dim(one.index_BK, dim=1)
        if plan.enhancer and one.index_BK.shape[1]:
            seen = Signals(prompt.x_1LD[:, image], (1, n))
            own_1K = own_1K + plan.enhancer.call("attention_bias", seen, one)
        elif plan.step.merges and one.weight_BKN is not None:
            own_1K = ((one.weight_BKN > 0).float() @ bias_1n.exp()[..., None])[..., 0].log()
        xs += [prompt.x_1LD[:, words], one.tokens(prompt.x_1LD[:, image])]
        places += [
            prompt.position_1L[:, words],
            prompt.position_1L[:, image].take_along_dim(one.index_BK, dim=1),
        ]
        biases += [prompt.bias_L[words], own_1K[0]]
        length += start - cursor
        runs.append((length, one.index_BK.shape[1]))
        length, cursor = length + one.index_BK.shape[1], start + n
    x_1LD = torch.cat([*xs, prompt.x_1LD[:, cursor:]], dim=1)
    position_1L = torch.cat([*places, prompt.position_1L[:, cursor:]], dim=1)
    bias_L = torch.cat([*biases, prompt.bias_L[cursor:]])
    if plan.policy == "renumber":
        count = x_1LD.shape[1]
        return Prompt(x_1LD, torch.arange(count)[None].to(x_1LD.device), count, runs, bias_L)
    return Prompt(x_1LD, position_1L, prompt.after, runs, bias_L)


def signals(
    language: Any, i: int, before: Prompt, now: Prompt, grid: tuple[int, int],
    twig: Twig | None = None,
) -> list[Signals]:  # fmt: skip
    """Everything that can be known of each image at the input of layer i, on which a twig may
    grow."""
    words, normed_1LD = now.words, language.norm(now.x_1LD)
    images = [slice(start, start + n) for start, n in now.runs]
    attended_by = (
        attended(language, i, before, now, twig) if language.attends else [{}] * len(images)
    )
    return [
        Signals(
            now.x_1LD[:, image],
            grid,
            before_BND=before.x_1LD[:, image],
            normed_BND=normed_1LD[:, image],
            text_BTD=normed_1LD[:, words],
            text_real_BT=torch.ones(1, len(words), dtype=torch.bool),
            **attention_of,
        )
        for image, attention_of in zip(images, attended_by, strict=True)
    ]


def attended(
    language: Any, i: int, before: Prompt, now: Prompt, twig: Twig | None
) -> list[dict[str, Any]]:
    """What attention says of each image there."""
    last, this, words = language.layers[i - 1], language.layers[i], now.words
    _, held_GLd, attended_LL = attention(language, last, before)
    q_HLd, k_GLd, coming_LL = attention(language, this, now)
    twig_LL = torch.zeros_like(coming_LL) if twig is None else in_twig(twig, now)
    held_LD, coming_LD = (k.transpose(0, 1).flatten(1) for k in (held_GLd, k_GLd))
    of_images = []
    for start, n in now.runs:
        image = slice(start, start + n)
        mean_H1d = q_HLd[:, image].mean(dim=1, keepdim=True)
        keys_Hnd = k_GLd[:, image].repeat_interleave(len(q_HLd) // len(k_GLd), dim=0)
        logits_H1n = mean_H1d @ keys_Hnd.mT / keys_Hnd.shape[-1] ** 0.5
        of_images.append(
            {
                "keys_BND": held_LD[None, image],
                "text_keys_BTD": held_LD[None, words],
                "next_keys_BND": coming_LD[None, image],
                "last_attention_BN": attended_LL[None, -1, image],
                "text_attention_BTN": attended_LL[None, words][:, :, image],
                "next_attention_BN": coming_LL[None, -1, image],
                "mean_attention_BN": logits_H1n.softmax(-1).mean(dim=0),
                "twig_attention_BN": twig_LL[None, -1, image],
            }
        )
    return of_images


def attention(layers: Any, layer: Any, prompt: Prompt) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries (H, L, d) and keys (G, L, d), and who attends to whom (L, L), mean over
    heads."""
    q_HLd, k_GLd = layer.turned(prompt.x_1LD, layers.rotary(prompt.position_1L))
    k_HLd = k_GLd.repeat_interleave(len(q_HLd) // len(k_GLd), dim=0)
    logits_HLL = (q_HLd @ k_HLd.mT).float() / q_HLd.shape[-1] ** 0.5
    logits_HLL = logits_HLL + causal(q_HLd.shape[1], q_HLd.device) + prompt.bias_L
    return q_HLd, k_GLd, logits_HLL.softmax(-1).mean(dim=0)


def in_twig(twig: Twig, prompt: Prompt) -> Tensor:
    """Who attends to whom in a twig's last layer (L, L), mean over heads."""
    done, last = Cached(prompt.x_1LD), len(twig.layers) - 1
    for i in range(last):
        prompt = done.through(twig, i, prompt)
    return attention(twig, twig.layers[last], prompt)[2]


def causal(L: int, device: torch.device) -> Tensor:
    """0 where a row sees another, minus infinity where not, (L, L)."""
    return torch.full((L, L), -torch.inf, device=device).triu(1)
