"""Images among words: one sequence of embeddings per prompt, each with its position.

Shapes: B prompts, I images over all prompts, N placeholders, K kept, L tokens, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mlx_vlm_prune.checkpoints.errors import UserError

from ..pruners import Reduction, Signals, Step, entry


class Prompt(Protocol):
    """Token ids, and (start, length) of each image's placeholders."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def runs(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class Spliced:
    """Prompts with their images in place, padded on the left to one length."""

    embeds_BLD: Tensor
    positions_BL: Tensor
    real_BL: Tensor  # False on padding
    next_B: Tensor  # the position after each prompt
    runs: list[list[tuple[int, int]]]  # (start, K) of each prompt's images, padding left out
    bias_BL: Tensor  # added to the attention a row gets
    first_bias_BL: Tensor | None = None  # in the first layer, in place of `bias_BL`
    distance_BP: Tensor | None = None  # what rows add for one so far before them, while read
    kept: Reduction | None = None  # of the images of all prompts
    rank_IK: Tensor | None = None  # `cls_rank_BN` of theirs, where a step asks for it

    @property
    def adds_to_attention(self) -> bool:
        return self.first_bias_BL is not None or bool(self.bias_BL.any())


def splice(
    embed: nn.Embedding,
    prompts: Sequence[Prompt],
    visual_IKD: Tensor | None,
    kept: Reduction | None,
    policy: str,
    bias_IK: Tensor | None = None,
) -> Spliced:
    """Put each image's K tokens in the place of its run of placeholders.

    With the policy "keep" a token has the position it had before pruning, and so has the
    text after it; with "renumber", which slots that stand nowhere in the image need, positions
    count. Raises UserError for an empty prompt.
    """
    if not prompts or not all(len(prompt.ids) for prompt in prompts):
        raise UserError("there must be at least one prompt, and in each at least one token")
    device, counted, image = embed.weight.device, policy == "renumber", 0
    sequences = []
    for prompt in prompts:
        slots = []
        for _ in prompt.runs:
            assert kept is not None and visual_IKD is not None
            x_KD, K = visual_IKD[image], visual_IKD.shape[1]
            index_K = None if kept.index_BK is None else kept.index_BK[image].to(device)
            bias_K = torch.zeros(K, device=device) if bias_IK is None else bias_IK[image]
            slots.append((x_KD, index_K, bias_K.to(device)))
            image += 1
        words_LD = embed(torch.tensor(prompt.ids, device=device))
        sequences.append(_splice_prompt(words_LD, prompt.runs, slots, counted))
    embeds, positions, biases, runs = zip(*sequences, strict=True)
    lengths = [len(x_LD) for x_LD in embeds] if counted else [len(p.ids) for p in prompts]
    real = [torch.ones_like(position_L, dtype=torch.bool) for position_L in positions]
    embeds_BLD, positions_BL, real_BL, bias_BL = (
        pad_sequence(list(x), batch_first=True, padding_side="left")
        for x in (embeds, positions, real, biases)
    )
    next_B = torch.tensor(lengths, device=device)
    return Spliced(embeds_BLD, positions_BL, real_BL, next_B, list(runs), bias_BL, kept=kept)


def _splice_prompt(
    words_LD: Tensor,
    runs: Sequence[tuple[int, int]],
    slots: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    counted: bool,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """One prompt's rows, positions, biases, and where its images now are."""
    count_L = torch.arange(len(words_LD), device=words_LD.device)
    zero_L = torch.zeros(len(words_LD), device=words_LD.device)
    x, positions, biases, new_runs, end = [], [], [], [], 0
    for (start, length), (x_KD, index_K, bias_K) in zip(runs, slots, strict=True):
        x += [words_LD[end:start], x_KD.to(words_LD)]
        biases += [zero_L[end:start], bias_K]
        positions.append(count_L[end:start])
        positions.append(count_L[: len(x_KD)] if index_K is None else start + index_K)
        new_runs.append((sum(map(len, x)) - len(x_KD), len(x_KD)))
        end = start + length
    x_LD = torch.cat([*x, words_LD[end:]])
    position_L = torch.cat([*positions, count_L[end:]])
    if counted:
        position_L = torch.arange(len(x_LD), device=words_LD.device)
    return x_LD, position_L, torch.cat([*biases, zero_L[end:]]), new_runs


def added_bias(enhancer: Step | None, encoded: Signals, kept: Reduction) -> Tensor | None:
    """What an enhancer adds to the attention that kept tokens get, (I, K)."""
    if enhancer is None:
        return None
    function = "prompt_bias" if enhancer.call("calibrates") else "attention_bias"
    bias_IK: Tensor = enhancer.call(function, encoded.to("cpu"), kept.to("cpu"))
    return bias_IK.to(encoded.x_BND.device)


def calibrated(spliced: Spliced, enhancer: Step | None, N: int) -> Spliced:
    """With what an enhancer adds while prompts are read: in the first layer to the attention of
    every visual row, and in all layers of prompts with images for distances."""
    K = next((K for runs in spliced.runs for _, K in runs), N)
    if enhancer is None or K == N or not enhancer.call("calibrates"):
        return spliced
    calibration = enhancer.call("calibration", N, K, int(spliced.next_B.max()))
    first_BL, rows = torch.zeros_like(spliced.bias_BL), []
    for b, runs in enumerate(spliced.runs):
        ahead = int((~spliced.real_BL[b]).sum())
        for start, K in runs:
            first_BL[b, ahead + start : ahead + start + K] = calibration[0]
        rows.append(calibration[1] * bool(runs))
    return replace(spliced, first_bias_BL=first_BL, distance_BP=torch.stack(rows).to(first_BL))


def with_ranks(spliced: Spliced, step: Step | None, encoded: Signals, kept: Reduction) -> Spliced:
    """With the ranks of images' tokens, where a step between the layers asks for them."""
    if step is None or "cls_rank" not in entry(step.method, "needs"):
        return spliced
    return replace(spliced, rank_IK=cls_ranks(encoded, kept))


def cls_ranks(encoded: Signals, kept: Reduction) -> Tensor:
    """What share of an image's kept tokens got more attention from CLS than each, (I, K)."""
    assert kept.index_BK is not None
    attention_IK = encoded.cls_attention_BN.take_along_dim(kept.index_BK, dim=1)
    order_IK = attention_IK.argsort(dim=1, descending=True, stable=True)
    return order_IK.argsort(dim=1) / order_IK.shape[1]


def outside(runs: Sequence[tuple[int, int]], length: int) -> list[int]:
    """Which of `length` places are in no run (start, length): those of the words."""
    inside = {i for start, n in runs for i in range(start, start + n)}
    return [i for i in range(length) if i not in inside]


def visible(real_BL: Tensor) -> Tensor:
    """Which tokens each token sees, (B, L, L): those before it that are no padding, and itself.

    Padding sees itself too, because a softmax over nothing is not a number.
    """
    L = real_BL.shape[1]
    itself_LL = torch.eye(L, dtype=torch.bool, device=real_BL.device)
    return real_BL[:, None].expand(-1, L, -1).tril() | itself_LL
