"""Prints the speed-up that the operation count allows, before anything is measured."""

from collections.abc import Sequence
from typing import Any

from mlx_vlm_prune.planning.operations import Operations, count
from mlx_vlm_prune.pruners import plan

from .model_shapes import parameter_counts

# Where tokens are dropped, and a method that drops them there at no cost.
PLACES = {
    "smaller image": "downsample",
    "before the tower's layers": "patch_norm",
    "after the tower": "uniform",
}


def print_ceiling(setting: Any, dtype: str, where: str, budgets: Sequence[int]) -> None:
    """Print the model, its multiply-adds, and the largest speed-up at each budget."""
    config, N = setting.config, setting.config.N
    full = count(config, setting.text, plan("none"), N)
    millions = " + ".join(f"{n / 1e6:.1f}" for n in parameter_counts(config).values())
    print(f"\n{setting.shape}, {dtype}, {where}: {N} visual tokens, {setting.text} of text", end="")
    print(f", {setting.batch} prompt{'s' if setting.batch > 1 else ''} at once")
    print(f"Parameters, millions: {millions} (tower, projector, language model)")
    print(f"Multiply-adds of a prompt, billions: tower {full.vision / 1e9:.2f}, projector "
          f"{full.projector / 1e9:.2f}, prefill {full.prefill / 1e9:.2f}; a new token "
          f"{full.decode / 1e9:.3f}")  # fmt: skip
    print("Ceiling by this count, times as fast as full:")
    print(f"{'tokens leave':>28}{'kept':>8}{'tower':>9}{'prefill':>10}{'first token':>14}")
    for place, method in PLACES.items():
        for K in budgets:
            pruned = _pruned_operations(setting, method, K)
            if pruned:
                gains = [getattr(full, part) / getattr(pruned, part) for part in
                         ("vision", "prefill", "first_token")]  # fmt: skip
                tower, prefill, first = (f"{gain:.2f}x" for gain in gains)
                kept = round(pruned.visual[0])
                print(f"{place:>28}{kept:>8}{tower:>9}{prefill:>10}{first:>14}")
    fixed = full.first_token / full.vision
    print(f"However few are kept after the tower: first token below {fixed:.2f}x\n", flush=True)


def _pruned_operations(setting: Any, method: str, K: int) -> Operations | None:
    """The count with K tokens, or None if the method cannot be: merged patches drop together."""
    config = setting.config
    if method == "patch_norm" and config.projector and config.projector.merge != (1, 1):
        return None
    return count(config, setting.text, plan(method), K)
