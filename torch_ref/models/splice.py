"""Images among words: one sequence of embeddings per prompt, each with its position.

Shapes: B prompts, I images over all prompts, N placeholders, K kept, L tokens, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mlx_vlm_prune.checkpoints.errors import UserError

from ..pruners import Reduction


class Row(Protocol):
    """A prompt: its token ids, and (start, length) of each image's run of placeholders."""

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


def splice(
    embed: nn.Embedding,
    rows: Sequence[Row],
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
    if not rows or not all(len(row.ids) for row in rows):
        raise UserError("there must be at least one prompt, and in each at least one token")
    device = embed.weight.device
    counted = policy == "renumber"
    prompts, image = [], 0
    for row in rows:
        slots = []
        for _ in row.runs:
            assert kept is not None and visual_IKD is not None
            x_KD, K = visual_IKD[image], visual_IKD.shape[1]
            index_K = None if kept.index_BK is None else kept.index_BK[image].to(device)
            bias_K = torch.zeros(K, device=device) if bias_IK is None else bias_IK[image]
            slots.append((x_KD, index_K, bias_K.to(device)))
            image += 1
        prompts.append(_one(embed(torch.tensor(row.ids, device=device)), row.runs, slots, counted))
    embeds, positions, biases, runs = zip(*prompts, strict=True)
    lengths = [len(x) if counted else len(row.ids) for x, row in zip(embeds, rows, strict=True)]
    real = [torch.ones_like(p, dtype=torch.bool) for p in positions]
    embeds_BLD, positions_BL, real_BL, bias_BL = (
        pad_sequence(list(x), batch_first=True, padding_side="left")
        for x in (embeds, positions, real, biases)
    )
    next_B = torch.tensor(lengths, device=device)
    return Spliced(embeds_BLD, positions_BL, real_BL, next_B, list(runs), bias_BL)


def _one(
    words_LD: Tensor,
    runs: Sequence[tuple[int, int]],
    slots: Sequence[tuple[Tensor, Tensor | None, Tensor]],
    counted: bool,
) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """One prompt's rows, positions, biases, and where its images now are."""
    place_L = torch.arange(len(words_LD), device=words_LD.device)
    none_L = torch.zeros(len(words_LD), device=words_LD.device)
    x, places, biases, now, end = [], [], [], [], 0
    for (start, length), (x_KD, index_K, bias_K) in zip(runs, slots, strict=True):
        x += [words_LD[end:start], x_KD.to(words_LD)]
        biases += [none_L[end:start], bias_K]
        places.append(place_L[end:start])
        places.append(place_L[: len(x_KD)] if index_K is None else start + index_K)
        now.append((sum(map(len, x)) - len(x_KD), len(x_KD)))
        end = start + length
    x_LD = torch.cat([*x, words_LD[end:]])
    position_L = torch.cat([*places, place_L[end:]])
    if counted:
        position_L = torch.arange(len(x_LD), device=words_LD.device)
    return x_LD, position_L, torch.cat([*biases, none_L[end:]]), now


def visible(real_BL: Tensor) -> Tensor:
    """Which tokens each token sees, (B, L, L): those before it that are no padding, and itself.

    Padding sees itself too, because a softmax over nothing is not a number.
    """
    L = real_BL.shape[1]
    itself_LL = torch.eye(L, dtype=torch.bool, device=real_BL.device)
    return real_BL[:, None].expand(-1, L, -1).tril() | itself_LL
