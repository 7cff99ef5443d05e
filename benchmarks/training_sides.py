"""Who trains in `benchmarks.training_speed`, each in its own process: ours, torch_ref, mlx-vlm.

Every side loads the same folder, a LLaVA as transformers writes it, and takes steps of its own
trainer on the same example: a picture, a question, an answer that is learned. Reading pictures and
words is timed nowhere. `main`, which training_speed starts, takes a case as JSON and obeys lines:
each `step` is answered with the seconds and the loss of one step as JSON, the end of the input with
the memory it took.
"""

import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_prune.checkpoints.families import read_checkpoint
from mlx_vlm_prune.inputs.prompt import Prompt
from mlx_vlm_prune.machine import blas
from mlx_vlm_prune.models.loading import load_folder
from mlx_vlm_prune.scenes.vocabulary import IMAGE_TOKEN, words
from mlx_vlm_prune.scenes.vocabulary import write as write_words
from mlx_vlm_prune.training.batches import Batch
from mlx_vlm_prune.training.config import TrainConfig

IMAGE = words().index(IMAGE_TOKEN)
VOCAB, PATCH, HEAD_DIM = 32000, 14, 64
QUESTION, ANSWER = 32, 32  # tokens; with the picture's a multiple of 32, to which mlx-vlm pads
RANK, SCALE, RATE, DECAY = 8, 2.0, 1e-4, 0.01


@dataclass(frozen=True)
class Size:
    """A model: layers and width of tower and language model, and patches per side of a picture."""

    tower: tuple[int, int]
    language: tuple[int, int]
    side: int
    vocab: int = VOCAB

    @property
    def tokens(self) -> int:
        """What a step reads: visual tokens before pruning, question and answer."""
        return self.side**2 + QUESTION + ANSWER


SIZES = {
    "tiny": Size((3, 64), (2, 64), 8, 256),
    "small": Size((4, 256), (4, 512), 16),
    "mid": Size((6, 384), (6, 640), 24),
}


@dataclass(frozen=True)
class Case:
    """What a side trains, and how."""

    side: str
    folder: str
    size: str
    stage: str  # lora; or sft, in which the language model learns
    dtype: str = "float32"
    grad_checkpoint: bool = False
    pruner: str = "none"
    keep_ratio: float | None = None

    @cached_property
    def example(self) -> tuple[list[int], np.ndarray]:
        """The ids, and the pixels (H, W, 3)."""
        size, half = SIZES[self.size], QUESTION // 2
        text = [10 + i % 80 for i in range(QUESTION + ANSWER)]
        edge = size.side * PATCH
        pixels_HW3 = np.random.default_rng(0).normal(size=(edge, edge, 3)).astype(np.float32)
        return [*text[:half], *[IMAGE] * size.side**2, *text[half:]], pixels_HW3

    @cached_property
    def batch(self) -> Batch:
        """The same as our trainers read it."""
        ids, pixels_HW3 = self.example
        is_answer = np.arange(len(ids)) >= len(ids) - ANSWER
        run = (QUESTION // 2, SIZES[self.size].side ** 2)
        return Batch([Prompt(ids, [run])], [is_answer], pixels_HW3[None], (0,))

    @property
    def config(self) -> TrainConfig:
        """The same of our trainers. In mlx-vlm a LLaVA's projector cannot learn: it is frozen."""
        values = {
            "stage": self.stage, "data": "none", "dtype": self.dtype, "batch_size": 1,
            "iters": 10**6, "grad_checkpoint": self.grad_checkpoint, "learning_rate": RATE,
            "optimizer": "adamw", "optimizer_config": {"weight_decay": DECAY},
            "freeze": ["projector"] if self.stage == "sft" else None, "pruner": self.pruner,
            "keep_ratio": self.keep_ratio,
        }  # fmt: skip
        if self.stage == "lora":
            parameters = {"rank": RANK, "scale": SCALE, "dropout": 0.0}
            values |= {"num_layers": -1, "lora_parameters": parameters}
        return TrainConfig.of(values, "the benchmark")


class OneBatch:
    """In a Reader's place: a batch that is read already."""

    def __init__(self, batch: Batch):
        self.read, self.dataset, self.blocks = batch, self, None
        self.bad: dict[int, str] = {}
        self.cut: set[int] = set()

    def __len__(self) -> int:
        return 1

    def batch(self, indices: np.ndarray, ahead: Any = ()) -> Batch:
        """Whatever is asked for."""
        return self.read


Steps = Iterator[tuple[float, float]]  # of each step: its seconds and its loss


def timed_steps(step: Callable[[int], tuple[float, int]]) -> Steps:
    """One step after another, whenever the next is asked for."""
    iteration = 0
    while True:
        begin = time.perf_counter()
        loss, _ = step(iteration)
        yield time.perf_counter() - begin, loss
        iteration += 1


def ours(case: Case) -> Steps:
    """By mlx_vlm_prune.train's trainer."""
    from mlx_vlm_prune.training.processes import Processes
    from mlx_vlm_prune.training.recompute import recompute_layers
    from mlx_vlm_prune.training.stages import LEARNERS
    from mlx_vlm_prune.training.trainer import Trainer

    model, _ = load_folder(Path(case.folder), "the model", case.dtype)
    learner = LEARNERS[case.stage](model, case.config)
    if case.grad_checkpoint:
        recompute_layers(learner)
    reader: Any = OneBatch(case.batch)
    trainer = Trainer(case.config, learner, reader, None, Processes())
    mx.eval(learner.parameters(), trainer.optimizer.state)
    return timed_steps(trainer.step)


def torch_ref(case: Case) -> Steps:
    """By torch_ref.train's trainer, on a CPU."""
    import torch

    from torch_ref.models.loading import load_checkpoint
    from torch_ref.training.processes import Processes
    from torch_ref.training.stages import LEARNERS
    from torch_ref.training.trainer import Trainer

    folder, device = Path(case.folder), torch.device("cpu")
    checkpoint = read_checkpoint(folder)
    model = load_checkpoint(checkpoint, folder, device)
    learner = LEARNERS[case.stage](model, checkpoint, folder, case.config)
    reader: Any = OneBatch(case.batch)
    return timed_steps(Trainer(case.config, learner, reader, None, Processes(device)).step)


def mlx_vlm(case: Case) -> Steps:
    """By the loop of mlx-vlm's `Trainer`, whose batches come when the next step is asked for.

    Its loop runs in a thread of its own, since it gives back nothing before it ends.
    """
    from queue import SimpleQueue
    from threading import Thread

    requests: SimpleQueue[None] = SimpleQueue()
    taken: SimpleQueue[tuple[float, float] | BaseException] = SimpleQueue()

    def loop() -> None:
        try:
            _train_by_mlx_vlm(case, requests, taken)
        except BaseException as e:
            taken.put(e)

    Thread(target=loop, daemon=True).start()
    while True:
        requests.put(None)
        outcome = taken.get()
        if isinstance(outcome, BaseException):
            raise outcome
        yield outcome


def _train_by_mlx_vlm(case: Case, requests: Any, taken: Any) -> None:
    from mlx import optimizers as optim
    from mlx_vlm.trainer import TrainingCallback, VLMTrainingArgs
    from mlx_vlm.trainer.vlm.sft.runtime import iterate_vlm_batches, train_vlm

    class Callback(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            taken.put((train_info["step_time"], train_info["train_loss"]))

    def batches(*given: Any, **options: Any) -> Iterator[Any]:
        for batch in iterate_vlm_batches(*given, **options):
            requests.get()
            yield batch

    args = VLMTrainingArgs(
        batch_size=1, iters=10**6, steps_per_report=1, steps_per_eval=None,
        steps_per_save=10**7, grad_checkpoint=case.grad_checkpoint, train_on_completions=True,
    )  # fmt: skip
    rate = optim.AdamW(RATE, weight_decay=DECAY, bias_correction=True)
    train_vlm(
        mlx_vlm_model(case), rate, [mlx_vlm_example(case)], args=args, iterate_batches=batches,
        training_callback=Callback(), seed=0,
    )  # fmt: skip


def mlx_vlm_model(case: Case) -> Any:
    """The model, prepared by mlx-vlm for a case's stage."""
    from mlx_vlm.trainer import prepare_model_for_training
    from mlx_vlm.utils import load_model

    model = load_model(Path(case.folder))
    model.set_dtype(getattr(mx, case.dtype))
    mx.eval(model.parameters())
    train_type = "full" if case.stage == "sft" else case.stage
    prepared = prepare_model_for_training(
        model, train_type=train_type, lora_rank=RANK, lora_alpha=RANK * SCALE, verbose=False
    )
    for part in (prepared.vision_tower, prepared.multi_modal_projector):
        part.freeze()  # MLX fails at the gradient of how mlx-vlm puts pictures among words
    return prepared


def mlx_vlm_example(case: Case) -> dict[str, mx.array]:
    """The example as mlx-vlm's data sets give it."""
    ids, pixels_HW3 = case.example
    (is_answer,) = case.batch.is_answer
    return {
        "input_ids": mx.array(ids), "attention_mask": mx.ones(len(ids), mx.int32),
        "completion_mask": mx.array(is_answer.astype(np.int32)),
        "pixel_values": mx.array(pixels_HW3).transpose(2, 0, 1).astype(getattr(mx, case.dtype)),
    }  # fmt: skip


def mlx_vlm_causal(case: Case) -> Steps:
    """No step: the loss of mlx-vlm's model, if no token sees a later one.

    Its trainer hands LLaVA the batch's mask of real tokens in place of a causal one.
    """
    from mlx_vlm.trainer.losses.cross_entropy import cross_entropy

    example = {name: x[None] for name, x in mlx_vlm_example(case).items()}
    ids_1L = example["input_ids"]
    logits_1LV = mlx_vlm_model(case)(ids_1L[:, :-1], example["pixel_values"], None).logits
    is_answer_1L = example["completion_mask"][:, 1:]
    loss, _ = cross_entropy(logits_1LV.astype(mx.float32), ids_1L[:, 1:], is_answer_1L)
    yield 0.0, float(loss.item())


SIDES: dict[str, Callable[[Case], Steps]] = {
    "ours": ours, "torch_ref": torch_ref, "mlx-vlm": mlx_vlm, "mlx-vlm causal": mlx_vlm_causal,
}  # fmt: skip


def write_model(folder: Path, name: str) -> None:
    """A LLaVA of a size with random float32 weights, as transformers writes it."""
    from mlx_vlm.models.llava import Model, ModelConfig, TextConfig, VisionConfig

    size = SIZES[name]
    (depth, width), (layers, D) = size.tower, size.language
    text = TextConfig(
        "llama", D, layers, D // HEAD_DIM * 172, D // HEAD_DIM, vocab_size=size.vocab,
        num_key_value_heads=D // HEAD_DIM, rms_norm_eps=1e-5,
    )  # fmt: skip
    vision = VisionConfig(
        "clip_vision_model", depth, width, 4 * width, width // HEAD_DIM,
        image_size=size.side * PATCH, patch_size=PATCH,
    )  # fmt: skip
    config = ModelConfig(text, vision, "llava", image_token_index=IMAGE, vocab_size=size.vocab)
    mx.random.seed(0)
    arrays: Any = tree_flatten(Model(config).parameters())
    weights = {
        name: x.transpose(0, 3, 1, 2) if name.endswith("patch_embedding.weight") else x
        for name, x in arrays
    }
    write_words(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"word{n}": n for n in range(len(vocabulary), size.vocab)}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})


def reset_peaks() -> None:
    """Count the largest memory from here on, where the system can."""
    mx.clear_cache()
    mx.reset_peak_memory()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def peaks() -> dict[str, int]:
    """Bytes: the most that MLX held at once, and the most that the process had in memory."""
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        process = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    else:
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"mlx": mx.get_peak_memory(), "process": process}


def main(argv: Sequence[str] | None = None) -> None:
    """Obey the lines of the input."""
    (text,) = sys.argv[1:] if argv is None else argv
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # trainers print
    case = Case(**json.loads(text))
    steps = SIDES[case.side](case)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    is_first = True
    for _ in sys.stdin:
        answer(next(steps))
        if is_first:
            is_first = False
            reset_peaks()
    answer({"peaks": peaks(), "blas": blas.loaded()})
