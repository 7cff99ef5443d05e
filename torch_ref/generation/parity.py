"""What MLX recorded of a model, recomputed here, and how far apart the two are.

The prompt's ids and the pixels are MLX's: a picture and a prompt are prepared once, for both. The
weights come from the files that were published, by the reference's own names.

Shapes: I images, K visual rows of all images, D features, T tokens of the answer, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
# Where scores are nearly equal, the last bit decides. So what lies outside is held against what
# noise of this size on the pixels does to PyTorch alone, in so many runs.
NOISE, NOISY_RUNS = 1e-6, 4


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
class Difference:
    """Between two computations of one method."""

    kept_apart: int | None  # tokens that one keeps and the other does not; None of pooled slots
    features: Error
    logits: Error

    @property
    def is_within(self) -> bool:
        return not self.kept_apart and self.features.is_within and self.logits.is_within

    def is_explained_by(self, noise: Sequence["Difference"]) -> bool:
        """Is each part within, or at most twice what noise does?"""
        most = 2 * max(each.kept_apart or 0 for each in noise)
        features = 2 * max(each.features.of_largest for each in noise)
        logits = 2 * max(each.logits.of_largest for each in noise)
        return (
            (self.kept_apart or 0) <= most
            and (self.features.is_within or self.features.of_largest <= features)
            and (self.logits.is_within or self.logits.of_largest <= logits)
        )


@dataclass(frozen=True)
class Comparison:
    """One method in both frameworks."""

    pruner: str
    K: int
    difference: Difference
    tokens: int  # of the answer
    tokens_equal: int  # before the first that differs
    is_near_tie: bool = False  # does PyTorch alone move as far by noise of the last bits?

    @property
    def agrees(self) -> bool:
        return self.difference.is_within and self.tokens_equal == self.tokens

    @property
    def verdict(self) -> str:
        return "agrees" if self.agrees else "near-tie" if self.is_near_tie else "apart"

    def as_json(self) -> dict[str, Any]:
        """A row of the file."""
        features, logits = self.difference.features, self.difference.logits
        return {
            "pruner": self.pruner, "K": self.K, "kept_apart": self.difference.kept_apart,
            "feature_error": features.of_largest,
            "feature_error_of_tolerance": features.of_tolerance,
            "logit_error": logits.of_largest, "logit_error_of_tolerance": logits.of_tolerance,
            "tokens": self.tokens, "tokens_equal": self.tokens_equal, "verdict": self.verdict,
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


@dataclass(frozen=True)
class Computed:
    """What PyTorch computes for one method."""

    kept: "Kept"
    features_KD: Tensor
    logits_TV: Tensor

    def minus(self, kept: Sequence[Sequence[Any]], features: Tensor, logits: Tensor) -> Difference:
        """How far another computation is from it."""
        return Difference(
            apart(self.kept, kept),
            Error.between(self.features_KD, features),
            Error.between(self.logits_TV, logits),
        )


@torch.no_grad()
def compare(model: VLM, recording: Recording, number: int) -> Comparison:
    """The method with this number in the recording. Raises UserError for arrays that do not fit."""
    facts = recording.facts["methods"][number]
    computed = compute(model, recording.prompt, recording.pixels_I3HW, facts)
    features, logits = (recording.arrays[f"{number}.{name}"] for name in ("features", "logits"))
    difference = computed.minus(facts["kept"], features, logits)
    chosen = computed.logits_TV.argmax(-1).tolist()
    pairs = zip(chosen, facts["tokens"], strict=True)
    equal = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), len(chosen))
    comparison = Comparison(facts["pruner"], facts["K"], difference, len(chosen), equal)
    if comparison.agrees:
        return comparison
    noise = noise_alone(model, recording, facts, computed)
    return replace(comparison, is_near_tie=difference.is_explained_by(noise))


def noise_alone(
    model: VLM, recording: Recording, facts: Mapping[str, Any], computed: Computed
) -> list[Difference]:
    """What noise on the pixels does to PyTorch's own computation."""
    pixels_I3HW, seeds = recording.pixels_I3HW, torch.Generator().manual_seed(0)
    size = NOISE * float(pixels_I3HW.abs().max())
    moved = []
    for _ in range(NOISY_RUNS):
        noise_I3HW = size * torch.randn(pixels_I3HW.shape, generator=seeds)
        other = compute(model, recording.prompt, pixels_I3HW + noise_I3HW, facts)
        moved.append(computed.minus(other.kept, other.features_KD, other.logits_TV))
    return moved


def compute(model: VLM, prompt: Prompt, pixels_I3HW: Tensor, facts: Mapping[str, Any]) -> Computed:
    """One method on these pixels, with the tokens of MLX's answer."""
    steps = parse_steps(facts["pruner"], model.N, facts["K"])
    pixels_I3HW = pixels_I3HW.to(model.device)
    spliced, cuts = model.embed([prompt], pixels_I3HW, steps, None, positions(steps))
    prefill = model.prefill(spliced, cuts)
    kept = kept_by_layer(spliced, prefill)
    visual = [spliced.embeds_BLD[0, start : start + K] for start, K in spliced.runs[0]]
    return Computed(kept, torch.cat(visual).cpu(), replayed(model, prefill, facts["tokens"]))


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
        # No decoder method pools, so each has an index.
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
