"""The loss of answers, with any pruner between tower and language model.

Shapes: B prompts, I images over all prompts, A tokens of answers over all prompts, L rows,
D features, V words, N visual tokens of an image.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mlx_vlm_prune.training.batches import Batch

from ..models.splice import outside, visible
from ..models.vlm import VLM
from ..pruners import Reduction, Step
from ..pruners.spec import positions


def answer_loss(model: VLM, batch: Batch, steps: Sequence[Step]) -> Tensor:
    """Cross-entropy of the answers, summed over their A tokens."""
    policy = positions(steps)
    spliced, cuts = model.embed(batch.prompts, pixels(batch, model.device), steps, None, policy)
    counts = [[K for _, K in runs] for runs in spliced.runs]
    if cuts.step is None and not spliced.bias_BL.any():
        see_BLL = visible(spliced.real_BL)
        hidden_BLD = model.language(spliced.embeds_BLD, spliced.positions_BL, see_BLL)
    else:
        prompts = model.read_each(spliced, cuts)
        hidden = [prompt.hidden_1LD[0] for prompt in prompts]
        hidden_BLD = pad_sequence(hidden, batch_first=True, padding_side="left")
        for b, prompt in enumerate(prompts):
            if prompt.reductions:
                counts[b] = [_kept(reduction) for reduction in prompt.reductions[-1][1]]
    hidden_AD = answer_rows(hidden_BLD, counts, batch)
    return cross_entropy_sum(model.language.logits(hidden_AD), batch)


def _kept(reduction: Reduction) -> int:
    assert reduction.index_BK is not None, "between layers tokens stay or leave"
    return reduction.index_BK.shape[1]


def pixels(batch: Batch, device: torch.device) -> Tensor | None:
    """The batch's images (I, 3, H, W), if any."""
    if batch.pixels_IHW3 is None:
        return None
    return torch.tensor(batch.pixels_IHW3, device=device).permute(0, 3, 1, 2).contiguous()


def answer_rows(hidden_BLD: Tensor, counts: Sequence[Sequence[int]], batch: Batch) -> Tensor:
    """Hidden states (A, D) after which the answers' tokens are to be said.

    `counts` is how many rows are left of each prompt's images. Prompts are padded on the left.
    """
    rows = []
    for b, (prompt, flags) in enumerate(zip(batch.prompts, batch.is_answer, strict=True)):
        words, gone, images = list[int](), 0, list(zip(prompt.runs, counts[b], strict=True))
        for i in outside(prompt.runs, len(prompt.ids)):
            while images and images[0][0][0] < i:
                (_, n), K = images.pop(0)
                gone += n - K
            if flags[i] and i:
                words.append(i - gone - 1)
        length = len(prompt.ids) - sum(n for _, n in prompt.runs) + sum(counts[b])
        ahead = hidden_BLD.shape[1] - length
        rows.append(hidden_BLD[b, [ahead + word for word in words]])
    return torch.cat(rows)


def cross_entropy_sum(logits_AV: Tensor, batch: Batch) -> Tensor:
    targets_A = torch.tensor(batch.targets_A, device=logits_AV.device)
    return F.cross_entropy(logits_AV.float(), targets_A, reduction="sum")
