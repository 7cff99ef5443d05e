"""Which tokens of every image were kept, step by step through a model.

A view is what the tower reads of an image: all of it, or one crop.

Shapes: N visual tokens of a view, K kept of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from .contract import Policy, Reduction


@dataclass(frozen=True)
class ReductionStep:
    """The reduction of every view that holds from `layer` of the language model on.

    `name` is that of the methods, empty where none pruned. A reduction refers to all N tokens of
    its view.
    """

    name: str
    layer: int
    reductions: list[Reduction]

    @property
    def rows(self) -> int:
        """Visual tokens of all views together."""
        return sum(reduction.slots for reduction in self.reductions)


@dataclass(frozen=True)
class Trace:
    """The reduction steps of one prompt, in order; empty without images."""

    steps: list[ReductionStep]
    sizes: list[int]  # N of each view
    images: list[int]  # the image of each view

    @classmethod
    def of_images(cls, steps: Sequence[ReductionStep], sizes: Sequence[int]) -> "Trace":
        """The trace of images that are one view each."""
        return cls(list(steps), list(sizes), list(range(len(sizes))))

    @property
    def image_count(self) -> int:
        return 1 + max(self.images, default=-1)

    def kept(self, image: int, step: int = -1) -> list[int] | None:
        """The tokens of an image that are kept after a step, numbered view after view; None where
        slots are pooled from all tokens."""
        kept: list[int] = []
        first = 0
        views = zip(self.images, self.sizes, self.steps[step].reductions, strict=True)
        for image_of_view, N, reduction in views:
            if image_of_view == image:
                index_1K = reduction.kept_tokens()
                if index_1K is None:
                    return None
                kept += (first + index_1K[0]).tolist()
                first += N
        return kept

    def left_of_images(self) -> tuple[int, ...]:
        """How many tokens of each image the language model's first layer reads."""
        step = [step for step in self.steps if step.layer == 0][-1]
        left = [0] * self.image_count
        for image, reduction in zip(self.images, step.reductions, strict=True):
            left[image] += reduction.slots
        return tuple(left)

    def policy(self, chosen: Policy) -> Policy:
        """The policy of positions that holds: pooled slots have no place, and are renumbered."""
        last = self.steps[-1].reductions if self.steps else []
        return "renumber" if any(kept.index_BK is None for kept in last) else chosen

    def of_views(self, first: int, end: int) -> "Trace":
        """The trace of one of several prompts, by its views: from `first` to before `end`."""
        if first == end:
            return Trace([], [], [])
        steps = [replace(step, reductions=step.reductions[first:end]) for step in self.steps]
        images = [image - self.images[first] for image in self.images[first:end]]
        return Trace(steps, self.sizes[first:end], images)

    def layers(self, depth: int) -> list[dict[str, Any]]:
        """For every run of layers with the same tokens, of a language model of `depth` layers: its
        first and last layer, its number of visual tokens, and which they are."""
        step_at = {step.layer: number for number, step in enumerate(self.steps)}
        ends = [*list(step_at)[1:], depth] if step_at else []
        return [
            {
                "first": first,
                "last": end - 1,
                "visual_tokens": self.steps[number].rows,
                "kept_indices": [self.kept(i, number) for i in range(self.image_count)],
            }
            for (first, number), end in zip(step_at.items(), ends, strict=True)
        ]

    def after_cuts(self, name: str, cuts: Sequence[tuple[int, list[Reduction]]]) -> "Trace":
        """The trace with a further step for each cut (layer, reduction of every view) of the
        decoder method `name`."""
        steps = list(self.steps)
        for layer, reductions in cuts:
            parts = zip(reductions, steps[-1].reductions, self.sizes, strict=True)
            whole = [kept.after(before, N) for kept, before, N in parts]
            steps.append(ReductionStep(f"{name}, layer {layer}", layer, whole))
        return replace(self, steps=steps)

    def steps_to_draw(self) -> list[ReductionStep]:
        """The steps at which a method pruned; all steps where none did."""
        return [step for step in self.steps if step.name] or self.steps
