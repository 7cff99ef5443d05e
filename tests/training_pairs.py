"""The same small random model and data in MLX, in the reference and in transformers, to train.

Shapes: I images, N visual tokens, L ids of a prompt.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from mlx import nn
from mlx.utils import tree_flatten
from PIL import Image
from torch.nn import functional as F

from convert.__main__ import main as convert
from mlx_vlm_prune.checkpoints.minimind.generations import GENERATIONS
from mlx_vlm_prune.checkpoints.names.renaming import to_our_names
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.training.batches import Batch
from mlx_vlm_prune.training.config import TrainConfig
from torch_ref.models.names import from_tensor

from . import generations

CPU = torch.device("cpu")
KINDS = {"llama and clip": "minimind2-v", "qwen3 and siglip": "minimind-3v"}
QUESTIONS = [
    ("where is the star ?", "left of it"),
    ("is there a red star ?", "yes"),
    ("what is in the picture ?", "a grey star and a red star"),
    ("how many ?", "two"),
]
Gradients = Mapping[str, np.ndarray]


def write_model(kind: str, folder: Path) -> Path:
    """A release as published and brought over: FOLDER/model is one of ours."""
    release = generations.release(KINDS[kind], False)
    release.write(folder)
    convert([
        "to-mlx", str(folder / "published.pth"), str(folder / "model"),
        "--vision", str(folder / "tower"), "--tokenizer", str(folder / "words"),
    ])  # fmt: skip
    return folder / "model"


def write_data(folder: Path, examples: int = 8) -> Path:
    """FOLDER/train.jsonl, every fourth without an image, and FOLDER/valid.jsonl."""
    random = np.random.default_rng(0)
    for split, count in (("train", examples), ("valid", 3)):
        lines = []
        for i in range(count):
            question, answer = QUESTIONS[i % len(QUESTIONS)]
            line = {"question": question, "answer": answer}
            if i % 4 != 3:
                pixels = random.integers(0, 256, (64, 64, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{split}{i}.png")
                line["image"] = f"{split}{i}.png"
            lines.append(json.dumps(line))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@dataclass(frozen=True)
class Runs:
    """Where the model and the data lie."""

    kind: str
    folder: Path

    @classmethod
    def written(cls, kind: str, folder: Path) -> "Runs":
        write_model(kind, folder)
        write_data(folder)
        return cls(kind, folder)

    def config(self, stage: str, out: str = "out", **keys: Any) -> TrainConfig:
        values: dict[str, Any] = {
            "stage": stage, "data": str(self.folder), "model": str(self.folder / "model"),
            "dtype": "float32", "iters": 10, "batch_size": 4, "learning_rate": 1e-3,
            "output": str(self.folder / out), "adapter_path": str(self.folder / out),
        }  # fmt: skip
        return TrainConfig.of({**values, **keys}, "the test")

    def mlx(self, config: TrainConfig) -> Any:
        from mlx_vlm_prune.training.processes import Processes
        from mlx_vlm_prune.training.run import make_trainer

        return make_trainer(config, Processes())

    def torch(self, config: TrainConfig) -> Any:
        from torch_ref.training.processes import Processes
        from torch_ref.training.run import make_trainer

        return make_trainer(config, Processes(CPU))


def mlx_gradients(trainer: Any, batch: Batch) -> tuple[float, Gradients]:
    """The summed loss and its gradients, by the names of a checkpoint."""
    learner = trainer.learner
    loss, gradients = nn.value_and_grad(learner, lambda batch: learner.loss(batch))(batch)
    flat: Any = tree_flatten(gradients)
    mx.eval(loss, gradients)
    return loss.item(), {name: np.array(value) for name, value in flat}


def torch_gradients(trainer: Any, batch: Batch) -> tuple[float, Gradients]:
    learner = trainer.learner
    loss = learner.loss(batch)
    loss.backward()
    gradients = {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}
    named = learner.to_ours(gradients)
    return loss.item(), {name: tensor.floats() for name, tensor in named.items()}


def transformers_gradients(kind: str, batch: Batch) -> tuple[float, Gradients]:
    """Of transformers' language model and tower, with a projector by its definition."""
    release = generations.release(KINDS[kind], False)
    language = release.transformers().train()
    leaves = {
        name: tensor.requires_grad_(True)
        for name, tensor in release.text.items()
        if "vision_proj" in name
    }
    total, image = torch.zeros(()), 0
    for prompt, flags in zip(batch.prompts, batch.is_answer, strict=True):
        ids_L = torch.tensor(prompt.ids)
        x_LD = language.get_input_embeddings()(ids_L)
        pieces, end = [], 0
        for start, n in prompt.runs:
            pixels_13HW = torch.tensor(batch.pixels_IHW3[image : image + 1]).permute(0, 3, 1, 2)
            pieces += [x_LD[end:start], release.project(release.encode_image(pixels_13HW))]
            end, image = start + n, image + 1
        logits_LV = language(inputs_embeds=torch.cat([*pieces, x_LD[end:]])[None]).logits[0]
        at = torch.tensor(flags[1:])
        total = total + F.cross_entropy(logits_LV[:-1][at], ids_L[1:][at], reduction="sum")
    total.backward()
    gradients = {name: p.grad for name, p in language.named_parameters()}
    gradients |= {name: leaf.grad for name, leaf in leaves.items()}
    raw: dict[str, RawTensor] = {
        name: from_tensor(gradient) for name, gradient in gradients.items()
    }
    named = to_our_names(raw, GENERATIONS[release.name].table, release.name, Path())
    return total.item(), {f"model.{name}": tensor.floats() for name, tensor in named.items()}


def weights(trainer: Any) -> Gradients:
    """What learns, of either framework, by the names of a checkpoint."""
    if isinstance(trainer.learner, nn.Module):
        flat: Any = tree_flatten(trainer.learner.trainable_parameters())
        return {name: np.array(value) for name, value in flat}
    named = trainer.learner.to_ours(trainer.learner.parameters)
    return {name: tensor.floats().copy() for name, tensor in named.items()}


# What is added to every key alters no attention: the gradient is rounding,
# of which Adam makes a step.
NO_GRADIENT = "k_proj.bias"


def assert_same(ours: Gradients, theirs: Gradients, tolerance: float) -> None:
    """The same names, and each tensor within a share of its largest number."""
    assert ours.keys() == theirs.keys() and ours
    for name, value in theirs.items():
        if name.endswith(NO_GRADIENT):
            continue
        largest = max(np.abs(value).max(), 1e-12)
        assert np.abs(ours[name] - value).max() <= tolerance * largest, name


def steps(trainer: Any, count: int) -> tuple[list[float], Gradients, Gradients]:
    """Every step's loss; what learned, by the names of a checkpoint; and how far each moved."""
    before = weights(trainer)
    losses = [trainer.step(i)[0] for i in range(count)]
    after = weights(trainer)
    return losses, after, {name: after[name] - before[name] for name in after}


def assert_same_moves(ours: Gradients, theirs: Gradients) -> None:
    """Each tensor's way has the same length and direction within 0.1 %."""
    for name, way in theirs.items():
        if name.endswith(NO_GRADIENT):
            continue
        assert np.linalg.norm(ours[name] - way) <= 1e-3 * np.linalg.norm(way), name
