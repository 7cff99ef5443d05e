"""A learned pruner of the scenes model.

Tower and language model stay as they are and only the pruner learns; or, unfrozen, they learn
along, and what they became ends in OUT/METHOD-unfrozen as the files of their own training.

- attention_pool: its K slots take the image's place; the answers' loss trains it.
- score_prune and mlp: only the K highest of the scores plus Gumbel noise are visible; the
  loss reaches all scores through a factor on attention, 1 or next to 0 in value and a
  sigmoid of the distance from the K-th in its gradient (straight-through). K is, in turn,
  half of the budget, as many, and twice as many.
- twig: its layers, which begin as the model's own, learn to say the answers from an early
  layer's output, all tokens visible; what they then look at ranks the tokens.
- mlp also: how many tokens an image needs, by the entropy of the tokens' shares in the
  derivative of the full model's loss by the log of the attention that each gets.

Stop it at any time: it continues from OUT/METHOD.pt. The pruner's weights go to
OUT/pruners.safetensors, which lies beside an MLX model.

Shapes: B pictures, N patches, K kept, L rows of the packed prompt, D features.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.checkpoint import LEARNED_FILE
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading import pth
from mlx_vlm_prune.checkpoints.reading.files import atomic_path, open_safetensors, write_safetensors

from ..models.language.minimind import rotary_table
from ..models.language.twig import Twig, grown
from ..models.loading import best_device, load_pth
from ..models.vlm import VLM
from ..pruners import METHODS, Signals
from ..pruners.attention_pool import AttentionPool
from ..pruners.mlp import Usefulness
from .recipes import PrunerRecipe
from .scenes import append_log, export, reading_checkpoint, save
from .scenes_data import Batch, ScenesBatches

DROPPED = 1e-20  # the factor of a dropped token: it gets no attention, but a gradient
FIRST = 100_000  # the number of the first batch: other scenes than the model saw


def answer_loss(vlm: VLM, visual_BND: Tensor, batch: Batch, bias_BN: Tensor | None) -> Tensor:
    """The answers' loss; `bias_BN` is added to the attention that visual tokens get."""
    first, N = batch.first_visual, visual_BND.shape[1]
    mask_BLL = torch.where(batch.visible(), 0.0, -torch.inf)
    if bias_BN is not None:
        L = mask_BLL.shape[1]
        row_BL = F.pad(bias_BN, (first, L - first - N))
        itself_LL = torch.eye(L, dtype=torch.bool, device=row_BL.device)
        mask_BLL = mask_BLL + torch.where(itself_LL, 0.0, row_BL[:, None])
    hidden_BLD = vlm.language(embed_prompts(vlm, visual_BND, batch), batch.positions, mask_BLL)
    logits = vlm.language.logits(hidden_BLD.flatten(0, 1)[batch.answer_at])
    return F.cross_entropy(logits.float(), batch.targets)


def embed_prompts(vlm: VLM, visual_BND: Tensor, batch: Batch) -> Tensor:
    """The prompts with their images in place, (B, L, D)."""
    first, embeds_BLD = batch.first_visual, vlm.language.embed_tokens(batch.ids)
    after = embeds_BLD[:, first + visual_BND.shape[1] :]
    return torch.cat([embeds_BLD[:, :first], visual_BND, after], dim=1)


def shorten_prompts(batch: Batch, N: int, K: int) -> Batch:
    """The same questions behind K placeholders instead of N, positions counting."""
    first, L = batch.first_visual, batch.ids.shape[1]
    stay = [*range(first + K), *range(first + N, L)]
    later = torch.arange(L, device=batch.ids.device) >= first + N
    row, column = batch.answer_at // L, batch.answer_at % L
    return Batch(
        batch.pixels, batch.dense, batch.summary, batch.ids[:, stay],
        (batch.positions - (N - K) * later)[:, stay], batch.branch[:, stay],
        row * len(stay) + column - (N - K), batch.targets, batch.answer_of, batch.kinds, first,
    )  # fmt: skip


def pool_loss(
    vlm: VLM, pool: AttentionPool, encoded: Signals, batch: Batch, K: int, noise: float
) -> Tensor:
    kept = pool.prune(encoded, K)
    shorter = shorten_prompts(batch, encoded.x_BND.shape[1], K)
    return answer_loss(vlm, vlm.projector(kept.tokens(encoded.x_BND)), shorter, None)


def _detach(encoded: Signals) -> Signals:
    attention_BN = encoded.cls_attention_BN
    return encoded.replace(x_BND=encoded.x_BND.detach(), cls_attention_BN=attention_BN.detach())


def score_loss(
    vlm: VLM, scorer: nn.Module, encoded: Signals, batch: Batch, K: int, noise: float
) -> Tensor:
    # What makes a score is no lesson for the tower: its gradients are only guesses.
    score_BN = scorer(_detach(encoded))
    gumbel_BN = -torch.empty_like(score_BN).exponential_().log()
    noisy_BN = score_BN + noise * gumbel_BN
    line_B1 = noisy_BN.detach().topk(K).values[:, -1:]
    soft_BN = torch.sigmoid(noisy_BN - line_B1)
    hard_BN = (noisy_BN >= line_B1).float().clamp(min=DROPPED)
    factor_BN = hard_BN + (soft_BN - soft_BN.detach())
    return answer_loss(vlm, vlm.projector(encoded.x_BND), batch, factor_BN.log())


def usefulness_loss(
    vlm: VLM, mlp: Usefulness, encoded: Signals, batch: Batch, K: int, noise: float
) -> Tensor:
    bias_BN = torch.zeros(encoded.x_BND.shape[:2], device=encoded.x_BND.device, requires_grad=True)
    full_loss = answer_loss(vlm, vlm.projector(encoded.x_BND), batch, bias_BN)
    (gradient_BN,) = torch.autograd.grad(full_loss, bias_BN, retain_graph=vlm.training)
    share_BN = gradient_BN.abs() / gradient_BN.abs().sum(dim=1, keepdim=True).clamp(min=1e-12)
    entropy_B = -(share_BN * share_BN.clamp(min=1e-12).log()).sum(dim=1)
    if mlp.mean_need.item() == 1:  # untrained: start where the needs are
        with torch.no_grad():
            mlp.need.bias.add_(entropy_B.mean() - mlp.log_need(encoded).mean())
            mlp.mean_need.copy_(entropy_B.exp().mean())
    predicted_B = mlp.log_need(_detach(encoded))
    mlp.mean_need.lerp_(predicted_B.detach().exp().mean(), 0.02)
    learned = score_loss(vlm, mlp, encoded, batch, K, noise) + F.mse_loss(predicted_B, entropy_B)
    return learned + full_loss if vlm.training else learned


def twig_loss(vlm: VLM, twig: Twig, encoded: Signals, batch: Batch, K: int, noise: float) -> Tensor:
    """The answers' loss after the twig, on the base's first layers; with the base's own where
    that learns along."""
    x_BLD, c = embed_prompts(vlm, vlm.projector(encoded.x_BND), batch), vlm.config.text
    mask_BLL = torch.where(batch.visible(), 0.0, -torch.inf)
    rotary = rotary_table(batch.positions, c.head_dim, c.rope_theta)
    for layer in vlm.language.layers[: int(twig.layer)]:
        x_BLD = layer(x_BLD, rotary, mask_BLL[:, None], None)
    hidden_BLD = twig(x_BLD, batch.positions, mask_BLL)
    logits = twig.head(hidden_BLD.flatten(0, 1)[batch.answer_at])
    loss = F.cross_entropy(logits.float(), batch.targets)
    if vlm.training:
        loss = loss + answer_loss(vlm, vlm.projector(encoded.x_BND), batch, None)
    return loss


LOSSES: dict[str, Callable[..., Tensor]] = {
    "attention_pool": pool_loss,
    "score_prune": score_loss,
    "mlp": usefulness_loss,
    "twig": twig_loss,
}


def untrained(name: str, vlm: VLM, recipe: PrunerRecipe) -> nn.Module:
    """What a training begins with."""
    if name == "twig":
        return grown(vlm.language, recipe.twig_layer, recipe.twig_layers)
    return METHODS[name].make_weights(vlm.config.vision.hidden_size, recipe.keep_tokens)


class Run:
    """A training under way: what a checkpoint holds, and how to go on from it."""

    def __init__(self, name: str, model: Path, out: Path, recipe: PrunerRecipe, unfreeze: bool):
        torch.manual_seed(recipe.seed)
        self.name, self.recipe, self.unfreeze, self.step = name, recipe, unfreeze, 0
        self.device, self.last = best_device(), out / f"{name}{'-unfrozen' * unfreeze}.pt"
        self.vlm = load_pth(model / "scenes.pth", model / "clip", self.device)
        most = self.vlm.N if name == "attention_pool" else self.vlm.N // 2  # scorers learn twice K
        if name != "twig" and recipe.keep_tokens > most:
            raise UserError(
                f"the budget is {recipe.keep_tokens} tokens; {name} learns with 1 to {most} of the"
                f" image's {self.vlm.N}"
            )
        self.vlm.requires_grad_(unfreeze).train(unfreeze)
        self.pruner = untrained(name, self.vlm, recipe).to(self.device)
        rate = recipe.twig_rate if name == "twig" else recipe.rate
        groups: list[dict[str, Any]] = [{"params": list(self.pruner.parameters()), "lr": rate}]
        if unfreeze:
            groups.append({"params": list(self.vlm.parameters()), "lr": recipe.model_rate})
        self.rates = [group["lr"] for group in groups]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        if self.last.exists():
            self.restore()

    def restore(self) -> None:
        with reading_checkpoint(self.last):
            saved = torch.load(self.last, map_location=self.device, weights_only=True)
            self.pruner.load_state_dict(saved["pruner"])
            self.vlm.load_state_dict(saved["model"])
            self.optimiser.load_state_dict(saved["optimiser"])
            self.step = saved["step"]

    @property
    def budget(self) -> int:
        """How many tokens this step keeps: pools have one K, scorers learn three in turn."""
        K = self.recipe.keep_tokens
        return K if self.name == "attention_pool" else max(1, K * 2 ** (self.step % 3) // 2)

    def advance(self, batch: Batch) -> float:
        """One step; its loss."""
        left = 0.5 + 0.5 * math.cos(math.pi * self.step / self.recipe.steps)
        groups = self.optimiser.param_groups
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * min(left, (self.step + 1) / self.recipe.warmup)
        with torch.set_grad_enabled(self.unfreeze):
            encoded = self.vlm.tower(batch.pixels, {"cls_attention": -1}).signals
        noise = self.recipe.noise * left
        loss = LOSSES[self.name](self.vlm, self.pruner, encoded, batch, self.budget, noise)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item()

    def save(self) -> None:
        state = {"pruner": self.pruner.state_dict(), "model": self.vlm.state_dict()}
        save(self.last, {**state, "optimiser": self.optimiser.state_dict(), "step": self.step})


def train(
    name: str, model: Path, out: Path, recipe: PrunerRecipe, unfreeze: bool, workers: int
) -> None:
    """Train from OUT/NAME.pt if it is there, and write the weights."""
    run = Run(name, model, out, recipe, unfreeze)
    out.mkdir(parents=True, exist_ok=True)
    data = ScenesBatches(recipe.batch, recipe.question_tokens, first=FIRST + run.step)
    loader = iter(DataLoader(data, batch_size=None, num_workers=workers))
    bar, saved = tqdm(total=recipe.steps, initial=run.step, desc=name), time.monotonic()
    while run.step < recipe.steps:
        loss = run.advance(next(loader).to(run.device))
        bar.update()
        if run.step % 20 == 0 or run.step == recipe.steps:
            bar.set_postfix_str(f"loss {loss:.3f}")
            row = {"method": name, "unfrozen": unfreeze, "step": run.step, "loss": loss}
            append_log(out, row)
        if time.monotonic() - saved > 120 or run.step == recipe.steps:
            saved = time.monotonic()
            run.save()
    finish(name, run.pruner, run.vlm, out / f"{name}-unfrozen" if unfreeze else out, unfreeze)


def finish(name: str, pruner: nn.Module, vlm: VLM, out: Path, unfreeze: bool) -> None:
    """Write OUT/pruners.safetensors, beside what other methods have there, and the model."""
    out.mkdir(parents=True, exist_ok=True)
    if unfreeze:
        export(vlm, out)
    file = out / LEARNED_FILE
    saved = open_safetensors(file) if file.exists() else {}
    saved = {key: value for key, value in saved.items() if not key.startswith(name + ".")}
    for key, value in pruner.state_dict().items():
        saved[f"{name}.{key.replace('pool_', '')}"] = pth.raw_tensor(value.half().cpu())
    with atomic_path(file, replace=True) as beside:
        write_safetensors(beside, saved, "mlx")
