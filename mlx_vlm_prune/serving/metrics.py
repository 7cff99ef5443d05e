"""Counters of a server, in Prometheus' text format (version 0.0.4)."""

from collections import Counter
from dataclasses import dataclass, field

from ..generation.result import GenerationResult

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
PREFIX = "mlx_vlm_prune"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Histogram:
    """Durations in seconds, by the bucket that they are within."""

    count: int = 0
    sum: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * len(BUCKETS))

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.count += 1
        self.sum += seconds
        self.within = [
            n + (seconds <= most) for n, most in zip(self.within, BUCKETS, strict=True)
        ]  # fmt: skip

    def lines(self, name: str) -> list[str]:
        """As Prometheus reads it."""
        buckets = zip((*map(str, BUCKETS), "+Inf"), (*self.within, self.count), strict=True)
        lines = [f'{name}_bucket{{le="{most}"}} {count}' for most, count in buckets]
        return [*lines, f"{name}_sum {self.sum:.6f}", f"{name}_count {self.count}"]


@dataclass
class Metrics:
    """What happened so far."""

    requests: Counter[str] = field(default_factory=Counter)  # by how they ended
    prompt_tokens: int = 0
    cached_tokens: int = 0
    visual_tokens: int = 0
    visual_tokens_kept: int = 0
    generated_tokens: int = 0
    ttft: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)

    def count_prompt(self, figures: GenerationResult, request_ms: float, queue_ms: float) -> None:
        """A prompt that was read; its body came and was opened in `request_ms`, and then waited."""
        self.prompt_tokens += figures.prompt_tokens
        self.cached_tokens += figures.rows_reused
        self.visual_tokens += figures.visual_tokens
        self.visual_tokens_kept += figures.visual_tokens_kept
        self.ttft.add((request_ms + queue_ms + figures.ttft_ms["total"]) / 1000)
        self.queue.add(queue_ms / 1000)

    def text(self, waiting: int, running: int) -> str:
        """All of it; so many requests wait and are being answered now."""
        lines = _head("requests_total", "counter", "Requests by the status that they ended with.")
        lines += [
            f'{PREFIX}_requests_total{{status="{status}"}} {count}'
            for status, count in sorted(self.requests.items())
        ]
        for name, value, help_text in (
            ("prompt_tokens_total", self.prompt_tokens, "Rows of prompts after pruning."),
            ("cached_tokens_total", self.cached_tokens, "Those of them that were not read again."),
            ("visual_tokens_total", self.visual_tokens, "Visual tokens of all images."),
            ("visual_tokens_kept_total", self.visual_tokens_kept, "Those that were kept."),
            ("generated_tokens_total", self.generated_tokens, "Tokens of answers."),
        ):
            lines += [*_head(name, "counter", help_text), f"{PREFIX}_{name} {value}"]
        for name, value, help_text in (
            ("requests_waiting", waiting, "Requests in the queue."),
            ("requests_running", running, "Requests whose answers are being written."),
        ):
            lines += [*_head(name, "gauge", help_text), f"{PREFIX}_{name} {value}"]
        for name, histogram, help_text in (
            (
                "time_to_first_token_seconds",
                self.ttft,
                "From a request's first byte to its first token.",
            ),
            (
                "queue_seconds",
                self.queue,
                "From a request that is complete to the begin of its prompt.",
            ),
        ):
            lines += _head(name, "histogram", help_text) + histogram.lines(f"{PREFIX}_{name}")
        return "\n".join([*lines, ""])


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {help_text}", f"# TYPE {PREFIX}_{name} {kind}"]
