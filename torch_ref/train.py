"""Train the scenes model from nothing: `python -m torch_ref.train --out runs/scenes`.

Two stages. First the tower alone learns what lies in every patch: the projected
patch must predict its words (shape, colour, cell, letter) through the tied
embedding. Then everything answers questions, many about each picture, each of
which sees the picture and itself only; the patch targets stay on.

Stop it at any time: it continues from its last checkpoint. The weights end as
OUT/scenes.pth (MiniMind2-V's published layout) and OUT/clip (a Hugging Face CLIP
folder), which `python -m convert to-mlx` brings over.

Shapes: B pictures, N patches, L prompt and question tokens together, D features, V words.
"""

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from .language.minimind import MiniMindConfig
from .model import VLM, VLMConfig, best_device
from .scenes_data import (
    IGNORE,
    MEAN,
    STD,
    Batch,
    ScenesBatches,
    dense_words,
    judge_batches,
    vocabulary,
)
from .towers.clip import CLIPConfig, CLIPTower


@dataclass(frozen=True)
class Recipe:
    """Every number of the training."""

    tower_steps: int = 1500  # the first stage
    steps: int = 7000  # both stages
    decay: float = 0.25  # the last share of the steps, in which the rate falls to zero
    warmup: int = 100
    batch: int = 32  # pictures
    question_tokens: int = 224  # per picture
    muon_rate: float = 2e-3  # matrices
    adam_rate: float = 1.5e-3  # all else
    weight_decay: float = 0.01
    dense_weight: float = 0.5  # of the patch loss in the second stage
    seed: int = 1


VISION = CLIPConfig(
    hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6
)
TEXT = MiniMindConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
NEIGHBOURS = (
    ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1), (0, 0)),
)
FREQUENCIES = 8  # per axis, in the position features


def build() -> VLM:
    """The untrained model."""
    words = vocabulary()
    text = MiniMindConfig(**{**asdict(TEXT), "vocab_size": len(words)})
    model = VLM(VLMConfig(VISION, text, image_token_id=words["@"]))
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.02 if "embed_tokens" not in name else 0.05)
        if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
            parameter.data /= (2 * TEXT.num_hidden_layers) ** 0.5
    nn.init.normal_(model.tower.embeddings.patch_embedding.weight, std=0.03)
    look_at_neighbours(model.tower)
    return model


@torch.no_grad()
def look_at_neighbours(tower: CLIPTower) -> None:
    """Begin with sine positions, and with heads that look at one neighbouring patch each.

    A transformer spends its first hours finding out which patches touch; the first two
    layers are told. A query turned by an offset's angles matches the key of the patch
    at that offset.
    """
    side, pairs = tower.config.side, 2 * FREQUENCIES
    rate = 2 * torch.pi / (2 * side) * torch.arange(1, FREQUENCIES + 1)
    row, column = torch.arange(side**2) // side, torch.arange(side**2) % side
    angle = torch.cat([row[:, None] * rate, column[:, None] * rate], dim=1)  # (N, pairs)
    embeddings = tower.embeddings
    embeddings.position_embedding.weight[:, : 2 * pairs] = 0
    embeddings.position_embedding.weight[1:, : 2 * pairs] = torch.cat([angle.sin(), angle.cos()], 1)
    embeddings.patch_embedding.weight[: 2 * pairs] = 0
    embeddings.class_embedding[: 2 * pairs] = 0
    d = tower.config.hidden_size // tower.config.num_attention_heads
    assert d == 2 * pairs, "a head's size must hold a sine and a cosine per frequency and axis"
    for layer, offsets in zip(tower.encoder.layers, NEIGHBOURS, strict=False):
        q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for head, (down, right) in enumerate(offsets):
            turn = torch.cat([down * rate, right * rate])
            cos, sin = torch.diag(turn.cos()), torch.diag(turn.sin())
            rows = slice(head * d, (head + 1) * d)
            q[rows] = k[rows] = 0
            q[rows, : 2 * pairs] = 1.6 * torch.cat(
                [torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)]
            )
            k[rows, : 2 * pairs] = 1.6 * torch.eye(d)


class Trainee(nn.Module):
    """The model and its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.vlm = build()
        self.summary = nn.Linear(
            VISION.hidden_size, dense_words().summary
        )  # CLS names what is there

    def forward(self, batch: Batch, questions: bool) -> tuple[Tensor, dict[str, Tensor]]:
        vlm, tower = self.vlm, self.vlm.tower
        x_BSD = tower.pre_layrnorm(tower.embeddings(batch.pixels))
        for layer in tower.encoder.layers:
            x_BSD = layer(x_BSD)
        summary = self.summary(tower.post_layernorm(x_BSD[:, 0]))
        cls_loss = F.binary_cross_entropy_with_logits(summary.float(), batch.summary)
        visual_BND = vlm.projector(x_BSD[:, 1:])
        dense, figures = self.dense_loss(visual_BND, batch.dense)
        loss = (
            dense + 0.3 * cls_loss
            if not questions
            else self.recipe_dense * (dense + 0.3 * cls_loss)
        )
        figures["cls"] = cls_loss.detach()
        if questions:
            logits = self.answers(visual_BND, batch)
            answer_loss = F.cross_entropy(logits.float(), batch.targets)
            loss = loss + answer_loss
            figures["answer"] = answer_loss.detach()
        return loss, figures

    recipe_dense = Recipe.dense_weight

    def dense_loss(self, visual_BND: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        words, figures = dense_words(), {}
        x = F.rms_norm(visual_BND.float(), visual_BND.shape[-1:])
        losses = []
        for i, (name, ids) in enumerate(words.groups.items()):
            table = self.vlm.language.embed_tokens.weight[ids].float()
            logits = (x @ table.T).flatten(0, 1)
            target = targets[..., i].flatten()
            weight = torch.ones(len(ids), device=logits.device)
            if name == "kind":
                weight[-1] = 0.05  # background
            losses.append(F.cross_entropy(logits, target, weight, ignore_index=IGNORE))
            with torch.no_grad():
                on = (target != IGNORE) & ((target != len(ids) - 1) | (name != "kind"))
                figures[name] = (logits.argmax(-1) == target)[on].float().mean()
        return torch.stack(losses).mean() * 2, figures

    def answers(self, visual_BND: Tensor, batch: Batch) -> Tensor:
        """Logits at the answers' tokens, (answer tokens of the whole batch, V)."""
        language = self.vlm.language
        embeds_BLD = language.embed_tokens(batch.ids)
        first = batch.first_visual
        embeds_BLD = torch.cat(
            [
                embeds_BLD[:, :first],
                visual_BND.type_as(embeds_BLD),
                embeds_BLD[:, first + visual_BND.shape[1] :],
            ],
            dim=1,
        )
        hidden = language(embeds_BLD, batch.positions, batch.visible())
        return language.logits(hidden.flatten(0, 1)[batch.answer_at])


def optimisers(trainee: Trainee, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (arXiv:2502.16982) for the matrices inside the layers, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in trainee.named_parameters():
        (matrices if ".layers." in name and p.ndim == 2 else rest).append(p)
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.muon_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, recipe: Recipe) -> float:
    """The share of the learning rate at a step: up, level, down."""
    down = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return max(0.0, min(1.0, (step + 1) / recipe.warmup, down))


@torch.no_grad()
def judge(trainee: Trainee, device: torch.device, per_kind: int) -> dict[str, float]:
    """The share of held-out questions answered exactly, per kind."""
    trainee.eval()
    right: dict[str, int] = {}
    asked: dict[str, int] = {}
    for batch in judge_batches(per_kind, 32):
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "mps"):
            x = trainee.vlm.projector(trainee.vlm.tower(batch.pixels).x_BND)
            guess = trainee.answers(x, batch).argmax(-1)
        ok = torch.ones(len(batch.kinds), dtype=torch.bool)
        ok.scatter_reduce_(0, batch.answer_of.cpu(), (guess == batch.targets).cpu(), "prod")
        for kind, good in zip(batch.kinds, ok.tolist(), strict=True):
            right[kind] = right.get(kind, 0) + good
            asked[kind] = asked.get(kind, 0) + 1
    trainee.train()
    return {kind: right[kind] / asked[kind] for kind in asked}


def save(path: Path, content: dict) -> None:
    """Write beside, then replace: a stopped run never leaves half a checkpoint."""
    beside = path.with_suffix(".part")
    torch.save(content, beside)
    os.replace(beside, path)


def export(vlm: VLM, out: Path) -> None:
    """Write OUT/scenes.pth and OUT/clip, the two halves MiniMind2-V is published in."""
    from safetensors.torch import save_file

    state = {k: v.half().cpu().contiguous() for k, v in vlm.state_dict().items()}
    flat = {k: v for k, v in state.items() if not k.startswith("vision_encoder.")}
    flat["lm_head.weight"] = flat["model.embed_tokens.weight"].clone()
    save(out / "scenes.pth", flat)
    clip = out / "clip"
    clip.mkdir(exist_ok=True)
    vision = {k.removeprefix("vision_encoder."): v for k, v in state.items() if k not in flat}
    save_file(vision, clip / "model.safetensors", metadata={"format": "pt"})
    config = {**asdict(VISION), "hidden_act": "quick_gelu", "model_type": "clip_vision_model"}
    side = VISION.image_size
    reading = {
        "crop_size": {"height": side, "width": side},
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,  # bicubic
        "size": {"shortest_edge": side},
    }
    for name, content in (("config.json", config), ("preprocessor_config.json", reading)):
        text = json.dumps(content, indent=4, sort_keys=True) + "\n"
        (clip / name).write_text(text, encoding="utf-8")


@dataclass
class Run:
    """A training under way: what a checkpoint holds, and how to go on from it."""

    trainee: Trainee
    recipe: Recipe
    device: torch.device
    step: int = 0

    def __post_init__(self) -> None:
        self.optimisers = optimisers(self.trainee, self.recipe)
        groups = [group for opt in self.optimisers for group in opt.param_groups]
        self.rates = [(group, group["lr"]) for group in groups]

    def restore(self, last: Path) -> None:
        held = torch.load(last, map_location=self.device, weights_only=True)
        self.trainee.load_state_dict(held["model"])
        for opt, state in zip(self.optimisers, held["optimisers"], strict=True):
            opt.load_state_dict(state)
        self.step = held["step"]

    def save(self, last: Path) -> None:
        states = [opt.state_dict() for opt in self.optimisers]
        save(last, {"model": self.trainee.state_dict(), "optimisers": states, "step": self.step})

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step; the figures of the batch it learned from."""
        share = rate(self.step, self.recipe)
        for group, full in self.rates:
            group["lr"] = full * share
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "mps"):
            loss, figures = self.trainee(batch, questions=self.step >= self.recipe.tower_steps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        for opt in self.optimisers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss.item()} | {name: value.item() for name, value in figures.items()}


def train(out: Path, recipe: Recipe, minutes: float, workers: int) -> None:
    """Train from OUT/last.pt if it is there; stop after `minutes` or `recipe.steps`."""
    torch.manual_seed(recipe.seed)
    device, last = best_device(), out / "last.pt"
    out.mkdir(parents=True, exist_ok=True)
    run = Run(Trainee().to(device), recipe, device)
    if last.exists():
        run.restore(last)
    data = ScenesBatches(recipe.batch, recipe.question_tokens, first=run.step)
    ahead = 4 if workers else None
    loader = iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=ahead))
    began = saved = time.monotonic()
    bar = tqdm(total=recipe.steps, initial=run.step, unit="step", smoothing=0.05)
    while run.step < recipe.steps and time.monotonic() - began < 60 * minutes:
        figures = run.advance(next(loader).to(device))
        bar.update()
        if run.step % 50 == 0:
            bar.set_postfix_str(" ".join(f"{name} {v:.3f}" for name, v in figures.items()))
            note(out, {"step": run.step, **figures, "seconds": round(time.monotonic() - began)})
        if time.monotonic() - saved > 180 or run.step == recipe.steps:
            saved = time.monotonic()
            run.save(last)
        if run.step > recipe.tower_steps and run.step % 500 == 0:
            held_out = judge(run.trainee, device, 200)
            tqdm.write(" ".join(f"{kind} {v:.2f}" for kind, v in held_out.items()))
            note(out, {"step": run.step, "held_out": held_out})
    export(run.trainee.vlm, out)


def note(out: Path, row: dict) -> None:
    """One line in OUT/log.jsonl."""
    with (out / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torch_ref.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this long")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--tower-steps", type=int, default=Recipe.tower_steps)
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes")
    args = parser.parse_args()
    recipe = Recipe(steps=args.steps, tower_steps=args.tower_steps)
    train(args.out, recipe, args.minutes, args.workers)


if __name__ == "__main__":
    main()
