"""What `pruned` did, prompt by prompt."""

from collections import deque
from dataclasses import dataclass, field

LATEST = 100  # prompts told of one by one


@dataclass(frozen=True)
class Prompt:
    """One prompt with images; a list has an entry for each image."""

    total: list[int]  # visual tokens
    kept: list[int]
    kept_indices: list[list[int] | None]  # None: pooled from everywhere
    rows: tuple[int, int]  # of the prompt, before and after
    seconds: dict[str, float]  # vision, pruner
    remembered: bool  # was the tower left out, since it had seen these images before?


@dataclass
class Report:
    """All prompts so far: sums, and the latest ones."""

    pruner: str
    positions: str
    total: int = 0
    kept: int = 0
    seconds: float = 0.0
    prompts: deque[Prompt] = field(default_factory=lambda: deque(maxlen=LATEST))

    def add(self, prompt: Prompt) -> None:
        self.total += sum(prompt.total)
        self.kept += sum(prompt.kept)
        self.seconds += sum(prompt.seconds.values())
        self.prompts.append(prompt)

    def __str__(self) -> str:
        share = 100 * (1 - self.kept / self.total) if self.total else 0.0
        return f"Visual tokens: {self.total} -> {self.kept} ({share:.1f}% pruned)"
