"""What the benchmarks time of a request. Turns and gains are mlx_vlm_prune/machine/timing.py's."""

from dataclasses import dataclass

PARTS = ("image", "vision", "pruner", "projector", "prefill")  # up to the first token


@dataclass(frozen=True)
class Run:
    """One timed request: milliseconds of each of PARTS, the mean of a new token, and memory.

    `cache_bytes` is the cache's size after the prompt. `peak_bytes` is None where the device does
    not count it. `token_ids` has each prompt's new tokens.
    """

    ms: dict[str, float]
    token_ms: float
    cache_bytes: int
    peak_bytes: int | None
    token_ids: list[list[int]]

    @property
    def figures(self) -> dict[str, float]:
        """Milliseconds of each part, of a new `token`, and of the first token in `total`."""
        return {**self.ms, "total": sum(self.ms.values()), "token": self.token_ms}
