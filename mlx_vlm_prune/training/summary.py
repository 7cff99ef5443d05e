"""What a run does and has done: which parts learn, what moved, what was left out, where it lies."""

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .config import ADAPTER_STAGES, TrainConfig
from .display import first_weights, in_words
from .learner import Learner
from .metrics import Metrics
from .trainer import Trainer

UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
COMMAND = "python -m mlx_vlm_prune.generate"


def fingerprints(learner: Learner) -> dict[str, int]:
    """A number of each tensor's bits; it changes with any one element."""
    arrays: Any = tree_flatten(learner.parameters())
    sums = {name: _fingerprint(array) for name, array in arrays}
    mx.eval(sums)
    return {name: int(value.item()) for name, value in sums.items()}  # type: ignore[arg-type]


def _fingerprint(array: mx.array) -> mx.array:
    """Of its elements' bits, each times an odd number of its own."""
    bits = array.flatten().view(UNSIGNED[array.itemsize]).astype(mx.uint32)
    return mx.sum(bits * (2 * mx.arange(bits.size, dtype=mx.uint32) + 1))


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "model" and len(parts) > 1 else parts[0]


def opening(trainer: Trainer) -> list[str]:
    """What is about to learn, from what."""
    c, learner = trainer.config, trainer.learner
    learns: Any = tree_flatten(learner.trainable_parameters())
    every: Any = tree_flatten(learner.parameters())
    names = {name for name, _ in learns}
    frozen = [(name, array) for name, array in every if name not in names]
    held_out = f", {len(trainer.valid.dataset)} held out" if trainer.valid else ""
    at_once = trainer.order.batch_size * c.grad_accumulation_steps
    begin = trainer.progress.iteration
    return [
        f"{c.stage}: {_sizes(learns)} learn; {_sizes(frozen) or 'nothing'} stay"
        + first_weights(learner.starts),
        f"{trainer.order.examples} examples{held_out}; {trainer.iters} steps of {at_once}"
        + (f", of which {begin} are done" if begin else ""),
    ]


def _sizes(tensors: Iterable[tuple[str, mx.array]]) -> str:
    """Parts with how many numbers each holds."""
    sizes: dict[str, int] = {}
    for name, array in tensors:
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + array.size
    return ", ".join(f"{part} ({size / 1e6:.3g} M)" for part, size in sizes.items())


def closing(
    trainer: Trainer, metrics: Metrics, before: Mapping[str, int], seconds: float
) -> list[str]:
    """What has become of a run that is at its end."""
    p, c = trainer.progress, trainer.config
    lines = [
        f"done: {p.iteration} steps, {trainer.epoch:.3g} passes over the data,"
        f" {p.trained_tokens:,} tokens of answers; {in_words(seconds)} since the start",
        _moved(trainer.learner, before),
        *_best(metrics),
    ]
    if p.bad:
        lines.append(f"left out: {len(p.bad)} examples that could not be used")
    if p.cut:
        lines.append(f"cut: {len(p.cut)} examples, to {trainer.data.max_seq_length} tokens")
    return [*lines, f"in {c.folder}: {', '.join(_files(c))}", usage(c)]


def _moved(learner: Learner, before: Mapping[str, int]) -> str:
    """By the bits of every tensor."""
    after = fingerprints(learner)
    moved: dict[str, int] = {}
    stayed: dict[str, int] = {}
    for name, number in after.items():
        group = stayed if before.get(name) == number else moved
        group[part_of(name)] = group.get(part_of(name), 0) + 1
    texts = [
        ", ".join(f"{part} ({n} tensors)" for part, n in group.items()) or "nothing"
        for group in (moved, stayed)
    ]
    return f"moved: {texts[0]}; stayed, bit for bit: {texts[1]}"


def _best(metrics: Metrics) -> list[str]:
    """The held-out figures at the start, at their best and at the end."""
    steps, losses = metrics.column("val_loss")
    if not losses:
        return []
    best = min(range(len(losses)), key=losses.__getitem__)
    lines = [
        f"held-out loss: {losses[0]:.4g} first, {losses[best]:.4g} best (step {steps[best]}),"
        f" {losses[-1]:.4g} last"
    ]
    for name, label in (("val_accuracy", "all tokens"), ("val_accuracy_pruned", "pruned")):
        _, shares = metrics.column(name)
        if shares:
            lines.append(f"answers right, {label}: {shares[0]:.1%} first, {shares[-1]:.1%} last")
    return lines


def _files(c: TrainConfig) -> list[str]:
    return sorted(
        path.name for path in c.folder.iterdir()
        if not path.name.startswith(".") and path.suffix != ".lock"
    )  # fmt: skip


def usage(c: TrainConfig) -> str:
    """The command that uses what a run has written."""
    words = COMMAND.split()
    if c.stage in ADAPTER_STAGES:
        words += ["--model", c.model] if c.model else []
        words += ["--adapter-path", c.adapter_path]
    else:
        words += ["--model", c.output]
    if c.stage == "twig":
        words += ["--num-draft-tokens", "5"]
    if c.pruner != "none":
        words += ["--pruner", c.pruner]
        words += ["--keep-ratio", f"{c.keep_ratio:g}"] if c.keep_ratio else []
        words += ["--keep-tokens", f"{c.keep_tokens}"] if c.keep_tokens else []
    return f"use it: {shlex.join(words)} --image PICTURE --prompt QUESTION"
