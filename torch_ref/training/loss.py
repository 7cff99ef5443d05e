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
from mlx_vlm_prune.training.validation import ShortQuestions

from ..models.splice import Spliced, outside, splice, visible
from ..models.vlm import VLM
from ..pruners import Reduction, Step
from ..pruners.spec import positions


def answer_loss(model: VLM, batch: Batch, steps: Sequence[Step]) -> Tensor:
    """Cross-entropy of the answers, summed over their A tokens."""
    policy = positions(steps)
    spliced, cuts = model.embed(batch.prompts, pixels(batch, model.device), steps, None, policy)
    counts = image_rows(spliced)
    if cuts.step is None and not spliced.adds_to_attention:
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


def factor_loss(
    model: VLM, batch: Batch, step: Step, K: int, noise: float
) -> tuple[Tensor, Tensor]:
    """The loss while a method's choice is soft, summed over the answers' tokens; and the part of it
    that is the answers' cross-entropy.

    Every visual token is there; those that the method would drop get next to no attention. What
    chooses is no lesson for the tower: its gradients are only guesses.
    """
    pixels_I3HW = pixels(batch, model.device)
    assert pixels_I3HW is not None, "there are images"
    encoded, _ = model.encode(pixels_I3HW, [step], batch.prompts)
    x_IND, signals, weights = model.projector(encoded.x_BND), encoded.constant, step.weights
    factor_IN = step.method.training_factor(weights, signals, K, noise)
    loss = biased_loss(model, batch, x_IND, factor_IN.log())
    if not hasattr(step.method, "training_loss"):
        return loss, loss
    bias_IN = torch.zeros(x_IND.shape[:2], device=x_IND.device, requires_grad=True)
    is_learning = any(p.requires_grad for p in model.parameters())
    with torch.enable_grad():
        full_loss = biased_loss(model, batch, x_IND, bias_IN)
        (gradient_IN,) = torch.autograd.grad(full_loss, bias_IN, retain_graph=is_learning)
    total = loss + batch.answer_tokens * step.method.training_loss(weights, signals, gradient_IN)
    return total + full_loss if is_learning else total, loss


def biased_loss(model: VLM, batch: Batch, x_IND: Tensor, bias_IN: Tensor) -> Tensor:
    """With all visual tokens; `bias_IN` is added to the attention that others pay to each.

    A row sees itself without it: one that is dropped has a gradient still, for which its own hidden
    state must be what it would be if it stayed.
    """
    images, N, _ = x_IND.shape
    every_IN = torch.arange(N, device=x_IND.device).expand(images, N)
    embed = model.language.embed_tokens
    spliced = splice(embed, batch.prompts, x_IND, Reduction(every_IN), "keep", bias_IN)
    L = spliced.embeds_BLD.shape[1]
    itself_LL = torch.eye(L, dtype=torch.bool, device=x_IND.device)
    mask_BLL = torch.where(itself_LL, 0.0, spliced.bias_BL[:, None])
    mask_BLL = torch.where(visible(spliced.real_BL), mask_BLL, -torch.inf)
    hidden_BLD = model.language(spliced.embeds_BLD, spliced.positions_BL, mask_BLL)
    hidden_AD = answer_rows(hidden_BLD, image_rows(spliced), batch)
    return cross_entropy_sum(model.language.logits(hidden_AD), batch)


def image_rows(spliced: Spliced) -> list[list[int]]:
    """How many rows there are of each prompt's images."""
    return [[K for _, K in runs] for runs in spliced.runs]


def pixels(batch: Batch | ShortQuestions, device: torch.device) -> Tensor | None:
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
