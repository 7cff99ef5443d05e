"""What a run does and has done: which parts learn, what moved, what was left out, where it lies."""

import shlex
from collections.abc import Mapping
from math import prod
from zlib import crc32

from ..checkpoints.user_module import with_files
from .config import ADAPTER_STAGES, TrainConfig
from .display import first_weights, in_words
from .metrics import Metrics
from .run_loop import RunLoop

COMMAND = "mlx-vlm-prune generate"
ORDER = ("tower", "projector", "language")  # of parts; others follow
Fingerprints = Mapping[str, tuple[int, int]]  # how many numbers a tensor has, and one of its bits


def fingerprints(trainer: RunLoop) -> Fingerprints:
    """Of each tensor of what is trained, and of what it stands in; any one bit changes it."""
    numbers = {name: (prod(raw.shape), crc32(raw.data.data)) for name, raw in trainer.tensors()}
    return dict(sorted(numbers.items(), key=lambda item: _place(part_of(item[0]))))


def _place(part: str) -> int:
    return (*ORDER, part).index(part)


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to."""
    parts = name.split(".")
    return parts[1] if parts[0] == "model" and len(parts) > 1 else parts[0]


def opening(trainer: RunLoop, tensors: Fingerprints) -> list[str]:
    """What is about to learn, from what."""
    c, names = trainer.config, trainer.learning()
    learn, stay = (
        _sizes({name: size for name, (size, _) in tensors.items() if (name in names) == learns})
        for learns in (True, False)
    )
    held_out = f", {len(trainer.valid.dataset)} held out" if trainer.valid else ""
    begin = trainer.progress.iteration
    return [
        f"{c.stage}: {learn} learn; {stay or 'nothing'} stay{trainer.place}"
        + first_weights(trainer.learner.starts),
        f"{trainer.order.examples} examples{held_out}; {trainer.iters} steps of {trainer.at_once}"
        + (f", of which {begin} are done" if begin else ""),
    ]


def _sizes(tensors: Mapping[str, int]) -> str:
    """Parts with how many numbers each holds."""
    sizes: dict[str, int] = {}
    for name, size in tensors.items():
        sizes[part_of(name)] = sizes.get(part_of(name), 0) + size
    return ", ".join(f"{part} ({size / 1e6:.3g} M)" for part, size in sizes.items())


def closing(trainer: RunLoop, metrics: Metrics, before: Fingerprints, seconds: float) -> list[str]:
    """What has become of a run that is at its end."""
    p, c = trainer.progress, trainer.config
    lines = [
        f"done: {p.iteration} steps, {trainer.epoch:.3g} passes over the data,"
        f" {p.trained_tokens:,} tokens of answers; {in_words(seconds)} since the start",
        _moved(fingerprints(trainer), before),
        *_best(metrics),
    ]
    if p.bad:
        lines.append(f"left out: {len(p.bad)} examples that could not be used")
    if p.cut:
        lines.append(f"cut: {len(p.cut)} examples, to {trainer.data.max_seq_length} tokens")
    return [*lines, f"in {c.folder}: {', '.join(_files(c))}", usage(c)]


def _moved(after: Fingerprints, before: Fingerprints) -> str:
    """By the bits of every tensor."""
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
        words += ["--pruner", with_files(c.pruner)]
        words += ["--keep-ratio", f"{c.keep_ratio:g}"] if c.keep_ratio else []
        words += ["--keep-tokens", f"{c.keep_tokens}"] if c.keep_tokens else []
    return f"use it: {shlex.join(words)} --image PICTURE --prompt QUESTION"
