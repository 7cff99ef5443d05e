"""A model of the drawn worlds, trained in two stages: from nothing, or from the built-in model.

First the tower alone learns what lies in every patch: the projected
patch must predict its words (shape, colour, cell, letter) through the tied
embedding. Then everything answers questions, many about each picture, each of
which sees the picture and itself only; the patch targets stay on.

Stop it at any time: it continues from its last checkpoint. The weights end as
OUT/scenes.pth (MiniMind2-V's published layout) and OUT/clip (a Hugging Face CLIP
folder), which `python -m convert to-mlx` brings over.

Shapes: B pictures, N patches, L prompt and question tokens together, D features, V words.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from mlx_vlm_prune.checkpoints.config import CONFIG
from mlx_vlm_prune.checkpoints.errors import UserError, reason
from mlx_vlm_prune.checkpoints.processor import PREPROCESSOR_CONFIG, TOKENIZER
from mlx_vlm_prune.checkpoints.reading import pth
from mlx_vlm_prune.checkpoints.reading.files import (
    append_json,
    atomic_path,
    write_atomically,
    write_safetensors,
)
from mlx_vlm_prune.checkpoints.reading.locks import locked
from mlx_vlm_prune.scenes import CHECKPOINT as BUILT_IN

from ..models.loading import best_device, load_folder
from ..models.vlm import VLM
from .muon import Float32Muon
from .recipes import ScenesRecipe
from .scenes_data import MEAN, STD, Batch, ScenesBatches, judge_batches
from .scenes_model import SIZES, Trainee, check_can_grow, grow


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 where that is faster: on CUDA. Most CPUs multiply it far slower than float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def optimisers(
    trainee: Trainee, recipe: ScenesRecipe, device: torch.device
) -> list[torch.optim.Optimizer]:
    """Muon (arXiv:2502.16982) for the matrices inside the layers, AdamW for the rest."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, p in trainee.named_parameters():
        if not p.requires_grad:
            continue
        (matrices if ".layers." in name and p.ndim == 2 else rest).append(p)
    return [
        (Float32Muon if device.type == "cpu" else torch.optim.Muon)(
            matrices,
            lr=recipe.muon_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=recipe.adam_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, recipe: ScenesRecipe) -> float:
    """The share of the learning rate at a step: up, level, down."""
    down = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return max(0.0, min(1.0, (step + 1) / recipe.warmup, down))


@torch.no_grad()
def judge(trainee: Trainee, device: torch.device, per_kind: int) -> dict[str, float]:
    """The share of held-out questions answered exactly, per kind."""
    trainee.eval()
    right: dict[str, int] = {}
    total: dict[str, int] = {}
    for batch in judge_batches(per_kind, 32, trainee.curriculum):
        batch = batch.to(device)
        with half_precision(device):
            x = trainee.vlm.projector(trainee.vlm.tower(batch.pixels).signals.x_BND)
            guess = trainee.answers(x, batch).argmax(-1)
        is_right = torch.ones(len(batch.kinds), dtype=torch.bool)
        is_right.scatter_reduce_(0, batch.answer_of.cpu(), (guess == batch.targets).cpu(), "prod")
        for kind, good in zip(batch.kinds, is_right.tolist(), strict=True):
            right[kind] = right.get(kind, 0) + good
            total[kind] = total.get(kind, 0) + 1
    trainee.train()
    return {kind: right[kind] / total[kind] for kind in total}


def save(path: Path, content: dict) -> None:
    """Write a checkpoint, or replace it: a stopped run never leaves half of one."""
    with atomic_path(path, replace=True) as beside:
        pth.save(beside, content)


@contextmanager
def reading_checkpoint(last: Path) -> Iterator[None]:
    """Raises UserError for whatever torch raises of a file that this training did not write."""
    try:
        yield
    except Exception as e:
        raise UserError(
            f"{last} is no checkpoint of this training ({reason(e)}); remove it to begin again"
        ) from None


def export(vlm: VLM, out: Path) -> None:
    """Write OUT/scenes.pth and OUT/clip, the two halves MiniMind2-V is published in."""
    state = {k: v.half().cpu().contiguous() for k, v in vlm.state_dict().items()}
    flat = {k: v for k, v in state.items() if not k.startswith("vision_encoder.")}
    flat["lm_head.weight"] = flat["model.embed_tokens.weight"].clone()
    save(out / "scenes.pth", flat)
    clip = out / "clip"
    clip.mkdir(exist_ok=True)
    tower = {k.removeprefix("vision_encoder."): v for k, v in state.items() if k not in flat}
    with atomic_path(clip / "model.safetensors", replace=True) as beside:
        write_safetensors(beside, {k: pth.raw_tensor(v) for k, v in tower.items()}, "pt")
    vision = vlm.config.vision
    config = {**asdict(vision), "hidden_act": "quick_gelu", "model_type": "clip_vision_model"}
    side = vision.image_size
    reading = {
        "crop_size": {"height": side, "width": side},
        "image_mean": MEAN,
        "image_std": STD,
        "resample": 3,  # bicubic
        "size": {"shortest_edge": side},
    }
    for name, content in ((CONFIG, config), (PREPROCESSOR_CONFIG, reading)):
        write_atomically(clip / name, json.dumps(content, indent=4, sort_keys=True) + "\n")


@dataclass
class Run:
    """A training under way: what a checkpoint holds, and how to go on from it."""

    trainee: Trainee
    recipe: ScenesRecipe
    device: torch.device
    step: int = 0

    def __post_init__(self) -> None:
        self.optimisers = optimisers(self.trainee, self.recipe, self.device)
        groups = [group for opt in self.optimisers for group in opt.param_groups]
        self.rates = [(group, group["lr"]) for group in groups]

    def restore(self, last: Path) -> None:
        with reading_checkpoint(last):
            saved = torch.load(last, map_location=self.device, weights_only=True)
            size, batch = saved.get("size", "small"), saved.get("batch", self.recipe.batch)
        if (size, batch) != (self.recipe.size, self.recipe.batch):
            raise UserError(
                f"{last} is of a training of size {size} with {batch} pictures a step; go on with"
                " these, or name another folder with out"
            )
        with reading_checkpoint(last):
            self.trainee.load_state_dict(saved["model"])
            for opt, state in zip(self.optimisers, saved["optimisers"], strict=True):
                opt.load_state_dict(state)
            self.step = saved["step"]

    def save(self, last: Path) -> None:
        states = [opt.state_dict() for opt in self.optimisers]
        recipe = {"size": self.recipe.size, "batch": self.recipe.batch}
        model = self.trainee.state_dict()
        save(last, {"model": model, "optimisers": states, "step": self.step, **recipe})

    def advance(self, batch: Batch) -> dict[str, float]:
        """One step; the figures of the batch it learned from."""
        share = rate(self.step, self.recipe)
        for group, full in self.rates:
            group["lr"] = full * share
        with half_precision(self.device):
            loss, figures = self.trainee(batch, questions=self.step >= self.recipe.tower_steps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trainee.parameters(), 1.0)
        for opt in self.optimisers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": loss.item()} | {name: value.item() for name, value in figures.items()}


def beginning(recipe: ScenesRecipe) -> Trainee:
    """The model before its first step."""
    trainee = Trainee(recipe.dense_weight, SIZES[recipe.size])
    if recipe.is_grown:
        folder = recipe.model or BUILT_IN
        shallow, checkpoint = load_folder(folder, torch.device("cpu"))
        words = Tokenizer.from_file(str(checkpoint.tokenizer_folder / TOKENIZER)).get_vocab()
        check_can_grow(trainee.vlm, shallow, words, trainee.curriculum.ids, folder)
        grow(trainee.vlm, shallow)
    if recipe.is_tower_kept:
        trainee.vlm.tower.requires_grad_(False)
        trainee.summary.requires_grad_(False)  # it reads the tower alone
    return trainee


def train(
    out: Path, recipe: ScenesRecipe, minutes: float, workers: int, is_compiled: bool = False
) -> None:
    """Train from OUT/last.pt if it is there; stop after `minutes` or `recipe.steps`.

    Raises UserError where another process trains in OUT.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "run.lock", f"another process is training in {out}; wait for it"):
        _train(out, recipe, minutes, workers, is_compiled)


def _train(
    out: Path, recipe: ScenesRecipe, minutes: float, workers: int, is_compiled: bool
) -> None:
    torch.manual_seed(recipe.seed)
    device, last = best_device(), out / "last.pt"
    run = Run(beginning(recipe).to(device), recipe, device)
    if last.exists():
        run.restore(last)
    is_cuda = device.type == "cuda"
    if is_compiled or is_cuda:
        run.trainee.vlm.tower.compile()
    if is_cuda:  # on a CPU it gains nothing
        run.trainee.vlm.language.compile()
    data = ScenesBatches(
        recipe.batch, recipe.question_tokens, run.step, run.trainee.curriculum, is_cuda
    )
    ahead = 4 if workers else None
    loader = iter(DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=ahead))
    began = saved = time.monotonic()
    bar = tqdm(total=recipe.steps, initial=run.step, unit="step", smoothing=0.05)
    while run.step < recipe.steps and time.monotonic() - began < 60 * minutes:
        figures = run.advance(next(loader).to(device))
        bar.update()
        if run.step % 50 == 0:
            bar.set_postfix_str(" ".join(f"{name} {v:.3f}" for name, v in figures.items()))
            append_log(
                out, {"step": run.step, **figures, "seconds": round(time.monotonic() - began)}
            )
        if time.monotonic() - saved > 180 or run.step == recipe.steps:
            saved = time.monotonic()
            run.save(last)
        is_last = run.step == recipe.steps
        if run.step > recipe.tower_steps and (run.step % 500 == 0 or is_last):
            held_out = judge(run.trainee, device, 200)
            tqdm.write(" ".join(f"{kind} {v:.2f}" for kind, v in held_out.items()))
            append_log(out, {"step": run.step, "held_out": held_out})
    export(run.trainee.vlm, out)


def append_log(out: Path, row: dict) -> None:
    """One line in OUT/log.jsonl."""
    append_json(out / "log.jsonl", row)
