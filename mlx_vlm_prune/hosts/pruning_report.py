"""What pruning did to the prompts of a model: `PruningReport`.

Which tokens stay is known on the device only, and a prompt's first logits wait for no report. So
the choices are read where somebody reads the report, or when the next prompts come.
"""

from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ..pruners.trace import Trace
from .prompt import PrunedPrompt

MAX_PROMPTS = 100  # the latest prompts, listed one by one


@dataclass(frozen=True)
class PromptReport:
    """Figures of one prompt with images; lists have an entry for each image."""

    total: list[int]  # visual tokens
    kept: list[int]  # in the mean of the language model's layers
    kept_indices: list[list[int] | None]  # None of pooled tokens, and where none were chosen
    rows: tuple[int, int]  # of the prompt, before and after pruning
    seconds: dict[str, float]  # of "vision" and "pruner"; none on a GPU, which waits for neither
    tower_skipped: bool  # the tower's output was cached, of the same images


def kept_by_image(trace: Trace, depth: int) -> list[int]:
    """Visual tokens of each image that so many layers hold, the first ones, in the mean."""
    held, steps = [0 for _ in range(trace.image_count)], trace.steps
    ends = [*(step.layer for step in steps[1:]), depth]
    for step, end in zip(steps, ends, strict=True):
        layers = min(end, depth) - min(step.layer, depth)
        for image, reduction in zip(trace.images, step.reductions, strict=True):
            held[image] += layers * reduction.slots
    return [round(rows / depth) for rows in held]


@dataclass
class PruningReport:
    """Sums over all prompts, and the latest prompts one by one."""

    pruner: str
    positions: str
    total: int = 0
    kept: int = 0
    seconds: float = 0.0
    auto: str | None = None  # why this method, where it was chosen
    _prompts: deque[PromptReport] = field(default_factory=lambda: deque(maxlen=MAX_PROMPTS))
    _unread: list[Trace] = field(default_factory=list)  # of the latest prompts

    @property
    def prompts(self) -> deque[PromptReport]:
        """The latest prompts; reads what is still on the device.

        Raises UserError where tokens were no numbers.
        """
        self.read_choices()
        return self._prompts

    def read_choices(self) -> None:
        """Read which tokens stayed of the latest prompts."""
        unread, self._unread = self._unread, []
        for number, trace in enumerate(unread[-MAX_PROMPTS:], -min(len(unread), MAX_PROMPTS)):
            indices: list[list[int] | None] = [None] * trace.image_count
            with suppress(RuntimeError):  # of a client that left before its prompt was computed
                indices = [trace.kept(image) for image in range(trace.image_count)]
            self._prompts[number] = replace(self._prompts[number], kept_indices=indices)

    def add(self, prompt: PrunedPrompt, ms: Mapping[str, float], tower_skipped: bool) -> None:
        trace, depth = prompt.trace, len(prompt.cache or [None])
        total = [0 for _ in range(trace.image_count)]
        for image, N in zip(trace.images, trace.sizes, strict=True):
            total[image] += N
        kept, first = kept_by_image(trace, depth), sum(kept_by_image(trace, 1))
        words = prompt.length - first
        rows = words + sum(total), words + sum(kept)
        seconds = {part: ms[part] / 1000 for part in ("vision", "pruner") if part in ms}
        self._prompts.append(PromptReport(total, kept, [], rows, seconds, tower_skipped))
        self._unread.append(trace)
        self.total += sum(total)
        self.kept += sum(kept)
        self.seconds += sum(seconds.values())

    def __str__(self) -> str:
        share = 100 * (1 - self.kept / self.total) if self.total else 0.0
        return f"Visual tokens: {self.total} -> {self.kept} ({share:.1f}% pruned)"
