"""The figures printed around an answer, and the record that --json writes."""

from collections.abc import Iterable
from typing import Any

from ..machine.clock import Timings
from ..machine.hardware import versions
from .result import GenerationResponse, GenerationResult

LINE = "=" * 10
FIELDS = (
    "text", "token_ids", "prompt_tokens", "generation_tokens", "visual_tokens",
    "visual_tokens_kept", "kept_indices", "layers", "cache_bytes", "pruner", "auto", "positions",
    "ttft_ms", "prompt_tps", "generation_tps", "drafted", "accepted", "finish_reason", "images",
)  # fmt: skip


def print_piece(text: str) -> None:
    """A piece of an answer, at once; what the output's encoding lacks as its escape."""
    try:
        print(text, end="", flush=True)
    except UnicodeEncodeError as problem:
        plain = text.encode(problem.encoding, "backslashreplace").decode(problem.encoding)
        print(plain, end="", flush=True)


def read_whole(responses: Iterable[GenerationResponse], verbose: bool) -> GenerationResult:
    """The result that the last piece of an answer has; with `verbose` pieces are printed."""
    for response in responses:
        if verbose:
            print_piece(response.text)
    if verbose:
        print()
    assert response.result, "the last piece has the result"
    return response.result


def print_figures(a: GenerationResult) -> None:
    if not a.text:
        print("The answer is empty: the model ended it at once")
    print(f"Prompt: {a.prompt_tokens} tokens, {a.prompt_tps:.3f} tokens-per-sec")
    print(f"Generation: {a.generation_tokens} tokens, {a.generation_tps:.3f} tokens-per-sec")
    print(f"Peak memory: {a.peak_memory:.3f} GB")
    if a.drafted is not None:
        share = f" ({a.accepted / a.drafted:.1%})" if a.drafted and a.accepted is not None else ""
        print(f"Drafted: {a.drafted}, accepted {a.accepted}{share}")
    if a.visual_tokens:
        pruned = 1 - a.visual_tokens_kept / a.visual_tokens
        print(f"Visual tokens: {a.visual_tokens} -> {a.visual_tokens_kept} ({pruned:.1%} pruned)")
        if len(a.layers) > 1:
            print(f"By layer: {_by_layer(a)}; {a.visual_tokens_kept} in the mean")
    if a.video and a.video["kept_by_group"]:
        counts = ", ".join(map(str, a.video["kept_by_group"]))
        print(f"Kept of each group of frames: {counts}")
    print(f"Time to first token: {a.ttft_ms['total']:.1f} ms ({times_by_part(a.ttft_ms)})")


def times_by_part(ttft_ms: Timings) -> str:
    """Milliseconds of each part of a time; parts that were not timed alone, together."""
    parts = {part: ms for part, ms in ttft_ms.items() if part != "total"}
    timed = {part: ms for part, ms in parts.items() if isinstance(ms, float)}
    untimed = " and ".join(part for part in parts if part not in timed)
    rest = {untimed: ttft_ms["total"] - sum(timed.values())} if untimed else {}
    return ", ".join(f"{part} {ms:.1f}" for part, ms in (timed | rest).items())


def _by_layer(a: GenerationResult) -> str:
    """How many visual tokens the layers of the language model hold, by runs of layers."""
    counts = []
    for run in a.layers:
        first, last = run["first"], run["last"]
        where = f"layer {first}" if first == last else f"layers {first} to {last}"
        counts.append(f"{run['visual_tokens']} in {where}")
    return ", ".join(counts)


def as_json(a: GenerationResult) -> dict[str, Any]:
    """The record that --json writes: the answer and every figure, without arrays."""
    return {
        **{name: getattr(a, name) for name in FIELDS},
        **({"video": a.video} if a.video else {}),
        "peak_memory_gb": a.peak_memory,
        "versions": versions(),
    }
