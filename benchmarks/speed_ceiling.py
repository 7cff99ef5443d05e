"""What the architecture allows, before anything is measured."""

from collections.abc import Sequence
from typing import Any

from mlx_vlm_prune.planning.operations import Operations, count
from mlx_vlm_prune.pruners import plan

from .model_shapes import parameters

# Where tokens leave, and a method that leaves the most there.
PLACES = {
    "smaller image": "downsample",
    "before the tower's layers": "patch_norm",
    "behind the tower": "uniform",
}


def announce(setting: Any, dtype: str, where: str, budgets: Sequence[int]) -> None:
    """Print the model, its work, and how many times as fast the count lets it be."""
    config, N = setting.config, setting.config.N
    full = count(config, setting.text, plan("none"), N)
    held = " + ".join(f"{n / 1e6:.1f}" for n in parameters(config).values())
    print(f"\n{setting.shape}, {dtype}, {where}: {N} visual tokens, {setting.text} of text", end="")
    print(f", {setting.batch} prompt{'s' if setting.batch > 1 else ''} at once")
    print(f"Parameters, millions: {held} (tower, projector, language model)")
    print(f"Multiply-adds of a prompt, billions: tower {full.vision / 1e9:.2f}, projector "
          f"{full.projector / 1e9:.2f}, prefill {full.prefill / 1e9:.2f}; a new token "
          f"{full.decode / 1e9:.3f}")  # fmt: skip
    print("Ceiling by this count, times as fast as full:")
    print(f"{'tokens leave':>28}{'kept':>8}{'tower':>9}{'prefill':>10}{'first token':>14}")
    for place, method in PLACES.items():
        for K in budgets:
            pruned = _allowed(setting, method, K)
            if pruned:
                gains = [getattr(full, part) / getattr(pruned, part) for part in
                         ("vision", "prefill", "first_token")]  # fmt: skip
                tower, prefill, first = (f"{gain:.2f}x" for gain in gains)
                kept = round(pruned.visual[0])
                print(f"{place:>28}{kept:>8}{tower:>9}{prefill:>10}{first:>14}")
    fixed = full.first_token / full.vision
    print(f"However few are kept behind the tower: first token below {fixed:.2f}x\n", flush=True)


def _allowed(setting: Any, method: str, K: int) -> Operations | None:
    """Patches that become one token together cannot leave alone."""
    config = setting.config
    if method == "patch_norm" and config.projector and config.projector.merge != (1, 1):
        return None
    return count(config, setting.text, plan(method), K)
