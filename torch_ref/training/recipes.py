"""Every number of the training. Imports no torch, so that its command can tell of them."""

from dataclasses import dataclass, replace
from pathlib import Path

from mlx_vlm_prune.checkpoints.errors import UserError


@dataclass(frozen=True)
class ScenesRecipe:
    """A model of the drawn worlds, from nothing or grown from the built-in one."""

    size: str = "small"  # of SIZES
    tower_steps: int = 1500  # the first stage
    steps: int = 7000  # both stages
    decay: float = 0.25  # the last share of the steps, in which the rate falls to zero
    warmup: int = 100
    batch: int = 32  # pictures
    question_tokens: int = 224  # per picture
    muon_rate: float = 2e-3  # matrices
    adam_rate: float = 1.5e-3  # all else
    weight_decay: float = 0.01
    dense_weight: float = 0.5  # of the patch loss in the second stage
    seed: int = 1
    is_grown: bool = False  # from a smaller model
    is_tower_kept: bool = False  # the smaller model's tower does not learn
    model: Path | None = None  # the smaller model, a folder that `convert` made; None: the built-in

    def __post_init__(self) -> None:
        """Raises UserError for steps of a tower that stays."""
        if self.is_tower_kept and self.tower_steps:
            raise UserError(f"tower_steps must be 0: the tower of {self.size} is not trained")


# deep: the built-in model with twelve layers in place of four, for methods between layers.
# pages: the built-in model with the words of printed pages.
# pages-deep: the model of pages with twelve layers.
# large: 384 pixels, 576 tokens, twelve layers, scenes and pages.
RECIPES = {
    "small": ScenesRecipe(),
    "deep": ScenesRecipe(
        size="deep",
        tower_steps=0,
        steps=130,
        warmup=20,
        batch=16,
        muon_rate=5e-4,
        adam_rate=2e-4,
        is_grown=True,
        is_tower_kept=True,
    ),
    "pages": ScenesRecipe(
        size="pages",
        tower_steps=4100,
        steps=8500,
        batch=16,
        muon_rate=1.5e-3,
        adam_rate=1e-3,
        is_grown=True,
    ),
    "large": ScenesRecipe(
        size="large", tower_steps=2500, steps=10_000, batch=64, question_tokens=320, warmup=200
    ),
}
RECIPES["pages-deep"] = replace(RECIPES["deep"], size="pages-deep", steps=400)
