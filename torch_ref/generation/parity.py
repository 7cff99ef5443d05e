"""What MLX recorded of a model, recomputed here, and how far apart the two are.

The prompt's ids and the pixels are MLX's: a picture and a prompt are prepared once, for both. The
weights come from the files that were published, by the reference's own names.

Shapes: I images, K visual rows of all images, D features, T tokens of the answer, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors, read_json

from ..models.loading import to_tensor
from ..models.splice import Spliced
from ..models.vlm import VLM, Prefill
from ..pruners.spec import parse_steps, positions

# What the order of float32 sums explains: of a value itself, and of the largest in its array. A sum
# is rounded at 6e-8, and layers add up: 1e-6 of the largest logit in a model of 3 layers, 2e-5 in
# one of 8 with large random weights. A wrong weight, activation or position is beyond 1e-3.
RELATIVE, OF_LARGEST = 1e-4, 1e-4


@dataclass(frozen=True)
class Prompt:
    """Token ids, and (start, length) of each image's placeholders."""

    ids: Sequence[int]
    runs: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Error:
    """The largest difference of two arrays: shares of the largest value and of the tolerance."""

    of_largest: float
    of_tolerance: float

    @classmethod
    def between(cls, ours: Tensor, theirs: Tensor) -> "Error":
        """Raises UserError for arrays of different shapes."""
        if ours.shape != theirs.shape:
            raise UserError(
                f"MLX has an array of shape {tuple(theirs.shape)} and PyTorch {tuple(ours.shape)}"
            )
        difference, size = (ours - theirs).abs().double(), ours.abs().double()
        if not difference.numel():
            return cls(0.0, 0.0)
        if not difference.isfinite().all():
            return cls(float("inf"), float("inf"))
        largest = float(size.max()) or 1e-30
        allowed = RELATIVE * size + OF_LARGEST * largest
        return cls(float(difference.max()) / largest, float((difference / allowed).max()))

    @property
    def is_within(self) -> bool:
        return self.of_tolerance <= 1


@dataclass(frozen=True)
class Comparison:
    """One method in both frameworks."""

    pruner: str
    K: int
    kept_apart: int | None  # tokens that MLX keeps and PyTorch does not; None of pooled slots
    features: Error
    logits: Error
    tokens: int  # of the answer
    tokens_equal: int  # before the first that differs

    @property
    def agrees(self) -> bool:
        within = self.features.is_within and self.logits.is_within
        return within and not self.kept_apart and self.tokens_equal == self.tokens

    def as_json(self) -> dict[str, Any]:
        """A row of the file."""
        return {
            "pruner": self.pruner, "K": self.K, "kept_apart": self.kept_apart,
            "feature_error": self.features.of_largest,
            "feature_error_of_tolerance": self.features.of_tolerance,
            "logit_error": self.logits.of_largest,
            "logit_error_of_tolerance": self.logits.of_tolerance,
            "tokens": self.tokens, "tokens_equal": self.tokens_equal, "agrees": self.agrees,
        }  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """What `mlx_vlm_prune.generation.recording` wrote to a folder."""

    facts: Mapping[str, Any]
    arrays: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Recording":
        arrays = open_safetensors(folder / "record.safetensors")
        facts = read_json(folder / "record.json")
        return cls(facts, {name: to_tensor(raw) for name, raw in arrays.items()})

    @property
    def prompt(self) -> Prompt:
        return Prompt(self.facts["ids"], [(start, n) for start, n in self.facts["runs"]])

    @property
    def pixels_I3HW(self) -> Tensor:
        return self.arrays["pixels"].permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def compare(model: VLM, recording: Recording, number: int) -> Comparison:
    """The method with this number in the recording. Raises UserError for arrays that do not fit."""
    facts = recording.facts["methods"][number]
    steps = parse_steps(facts["pruner"], model.N, facts["K"])
    spliced, cuts = model.embed(
        [recording.prompt], recording.pixels_I3HW.to(model.device), steps, None, positions(steps)
    )
    prefill = model.prefill(spliced, cuts)
    kept = kept_by_layer(spliced, prefill)
    visual = [spliced.embeds_BLD[0, start : start + K] for start, K in spliced.runs[0]]
    logits_TV = replayed(model, prefill, facts["tokens"])
    chosen = logits_TV.argmax(-1).tolist()
    pairs = zip(chosen, facts["tokens"], strict=True)
    equal = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(chosen))
    return Comparison(
        facts["pruner"], facts["K"], apart(kept, facts["kept"]),
        Error.between(torch.cat(visual).cpu(), recording.arrays[f"{number}.features"]),
        Error.between(logits_TV, recording.arrays[f"{number}.logits"]),
        len(chosen), equal,
    )  # fmt: skip


def replayed(model: VLM, prefill: Prefill, tokens: Sequence[int]) -> Tensor:
    """The logits (T, V) that choose each token of MLX's answer, given those before it.

    Where each is the likeliest, the greedy answers are equal.
    """
    logits = [prefill.logits_BV[0].cpu()]
    for token in tokens[:-1]:
        model.step(prefill, torch.tensor([token], device=model.device))
        logits.append(prefill.logits_BV[0].cpu())
    return torch.stack(logits)


Kept = list[tuple[int, list[list[int] | None]]]  # from which layer on, which tokens of each image


def kept_by_layer(spliced: Spliced, prefill: Prefill) -> Kept:
    """Of the one prompt; None of slots that are pooled from all tokens."""
    assert spliced.kept is not None, "there is an image"
    index_IK = spliced.kept.index_BK
    images = len(spliced.runs[0])
    if index_IK is None:
        return [(0, [None] * images)]
    index = [index_IK[i].cpu() for i in range(images)]
    kept: Kept = [(0, [index_K.tolist() for index_K in index])]
    for layer, cuts in prefill.each[0].reductions if prefill.each else ():
        pairs = zip(index, cuts, strict=True)
        index = [before[cut.index_BK[0].cpu()] for before, cut in pairs]  # type: ignore[index]
        kept.append((layer, [index_K.tolist() for index_K in index]))
    return kept


def apart(ours: Kept, theirs: Sequence[Sequence[Any]]) -> int | None:
    """How many tokens one framework keeps and the other does not, over layers and images; None
    where slots are pooled. A layer at which one of them alone drops tokens counts all of its."""
    mine, other = dict(ours), {layer: kept for layer, kept in theirs}
    if any(indices is None for kept in other.values() for indices in kept):
        return None
    count = 0
    for layer in {*mine, *other}:
        images = len(other[0])
        pairs = zip(mine.get(layer, [[]] * images), other.get(layer, [[]] * images), strict=True)
        count += sum(len(set(a or ()) ^ set(b)) for a, b in pairs)
    return count
