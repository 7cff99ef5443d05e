"""Images among words: one sequence of embeddings per prompt, each with its position.

Shapes: B prompts, I images over all prompts, N placeholders, K kept, L tokens, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from convert.errors import UserError

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


def splice(
    embed: nn.Embedding,
    rows: Sequence[Row],
    visual_IKD: Tensor | None,
    kept: Reduction | None,
    policy: str,
) -> Spliced:
    """Put each image's K tokens in the place of its run of placeholders.

    With the policy "keep" a token has the position it had before pruning, and so has the
    text after it; with "renumber", or where slots stand nowhere in the image, positions
    count. Raises UserError for an empty prompt.
    """
    if not rows or not all(len(row.ids) for row in rows):
        raise UserError("there must be at least one prompt, and in each at least one token")
    device = embed.weight.device
    counted = policy == "renumber" or (kept is not None and kept.index_BK is None)
    embeds, positions, image = [], [], 0
    for row in rows:
        words_LD = embed(torch.tensor(row.ids, device=device))
        place_L = torch.arange(len(row.ids), device=device)
        e, p, end = [], [], 0
        for start, length in row.runs:
            assert kept is not None and visual_IKD is not None
            e += [words_LD[end:start], visual_IKD[image].to(words_LD)]
            if kept.index_BK is not None:
                p += [place_L[end:start], start + kept.index_BK[image].to(device)]
            end, image = start + length, image + 1
        embeds.append(torch.cat([*e, words_LD[end:]]))
        if counted:
            positions.append(torch.arange(len(embeds[-1]), device=device))
        else:
            positions.append(torch.cat([*p, place_L[end:]]))
    lengths = [len(x) if counted else len(row.ids) for x, row in zip(embeds, rows, strict=True)]
    real = [torch.ones_like(p, dtype=torch.bool) for p in positions]
    embeds_BLD, positions_BL, real_BL = (
        pad_sequence(x, batch_first=True, padding_side="left") for x in (embeds, positions, real)
    )
    return Spliced(embeds_BLD, positions_BL, real_BL, torch.tensor(lengths, device=device))


def visible(real_BL: Tensor) -> Tensor:
    """Which tokens each token sees, (B, L, L): those before it that are no padding, and itself.

    Padding sees itself too, because a softmax over nothing is not a number.
    """
    L = real_BL.shape[1]
    itself_LL = torch.eye(L, dtype=torch.bool, device=real_BL.device)
    return real_BL[:, None].expand(-1, L, -1).tril() | itself_LL
