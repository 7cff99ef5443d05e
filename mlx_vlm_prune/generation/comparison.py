"""Full beside pruned, by several runs in turns: how much sooner an answer comes, and the spread.

Opening the pictures is the same work in all runs, so it is told apart from the rest.
"""

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..machine.timing import Gain
from .overlay import add_caption, join_images
from .result import GenerationResult

SECONDS, MOST_SECONDS = 2.0, 30.0  # of all runs: at least, and where a round takes long at most
FEWEST = 3  # rounds whose agreement is no accident
QUOTED = 120  # letters of an answer below a picture
NOT_DRAWN = "an answer in letters that the font of this picture lacks"
MOST_TOKENS = 48  # of an answer that is timed to its end
logger = logging.getLogger("mlx_vlm_prune")
FULL, PRUNED, DRAFTED = "All visual tokens", "Pruned", "Pruned and drafted"


@dataclass(frozen=True)
class RunTimes:
    """Milliseconds of a run: opening the pictures, and from there to the first token and to the end
    of the answer, which has so many `tokens`."""

    opening: float
    first_token: float
    whole: float
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """The runs of each way to answer, by its name, in turns: plain first."""

    runs: Mapping[str, Sequence[RunTimes]]
    has_drafts: bool = False
    max_tokens: int = 1  # of the answers that were timed

    def ms(self, way: str, part: str) -> list[float]:
        return [getattr(run, part) for run in self.runs[way]]

    def gain(self, way: str, part: str, baseline: str) -> Gain:
        return Gain.of(self.ms(baseline, part), self.ms(way, part))

    @property
    def opening_ms(self) -> float:
        return median(ms for way in self.runs for ms in self.ms(way, "opening"))

    @property
    def lines(self) -> list[str]:
        """What the runs say, a line each."""
        plain, *others = self.runs
        lines = [f"Opening the pictures: {self.opening_ms:.1f} ms, with or without pruning"]
        first = self._pair(others[0], "first_token", plain)
        lines.append(f"Time to first token from there: {first}")
        if self.has_drafts:
            pairs = [(way, plain) for way in others] + [(others[-1], others[0])]
            part = f"Answer of at most {self.max_tokens} tokens from there"
            lines += [f"{part}: {self._pair(a, 'whole', b)}" for a, b in pairs]
        return lines

    def first_token_line(self, way: str) -> str:
        """When the first token of a way comes, without opening the pictures, and the spread of its
        gain over plain."""
        plain = next(iter(self.runs))
        line = f"first token after {median(self.ms(way, 'first_token')):.0f} ms"
        if way == plain:
            return line
        gain = self.gain(way, "first_token", plain)
        if gain.runs < FEWEST:
            return line
        if gain.p10 <= 1 <= gain.p90:
            return f"{line}, no clear difference"
        return f"{line}, {gain.p10:.2f} to {gain.p90:.2f} x as fast"

    def _pair(self, way: str, part: str, baseline: str) -> str:
        gain, names = self.gain(way, part, baseline), (baseline, way)
        a, b = (f"{name} {median(self.ms(name, part)):.1f} ms" for name in names)
        if part == "whole":
            tokens = [self.runs[name][0].tokens for name in names]
            a, b = f"{a} ({tokens[0]} tokens)", f"{b} ({tokens[1]} tokens)"
        return f"{a} -> {b}, {_in_words(gain)}"

    def as_json(self) -> dict[str, Any]:
        """Medians of every way, and its gains over plain: None where they are not clear."""
        plain, *others = self.runs
        parts = ("first_token", "whole") if self.has_drafts else ("first_token",)
        return {
            "opening_ms": self.opening_ms,
            **({"max_tokens": self.max_tokens} if self.has_drafts else {}),
            "ms": {
                way: {part: median(self.ms(way, part)) for part in parts} for way in self.runs
            },
            "gain": {
                way: {part: self._gain_json(way, part, plain) for part in parts} for way in others
            },
        }  # fmt: skip

    def _gain_json(self, way: str, part: str, baseline: str) -> dict[str, Any]:
        gain = self.gain(way, part, baseline)
        reported = gain.median if is_clear(gain) else None
        return {"median": reported, "p10": gain.p10, "p90": gain.p90, "turns": gain.runs}


def _in_words(gain: Gain) -> str:
    """A gain with its spread; one figure only where that is small."""
    turns = f"{gain.runs} turn{'s' * (gain.runs > 1)}"
    spread = f"{gain.p10:.2f} to {gain.p90:.2f} x as fast in {turns}"
    if is_clear(gain):
        return f"{gain.median:.2f} x as fast ({gain.p10:.2f} to {gain.p90:.2f} in {turns})"
    if gain.p10 <= 1 <= gain.p90:
        return f"no clear difference ({spread})"
    many = "much spread" if gain.runs >= FEWEST else "few turns"
    return f"{spread}, too {many} for one figure"


def is_clear(gain: Gain) -> bool:
    """Whether enough turns agree on a gain."""
    return gain.runs >= FEWEST and gain.is_clear


def ways_to_answer(
    options: Mapping[str, Any], budget: Mapping[str, Any], compares: bool
) -> dict[str, dict[str, Any]]:
    """The options of each answer by its title: plain, pruned, and pruned and drafted; or those of
    one answer alone."""
    whole = {**options, **budget}
    if not compares:
        return {"": whole}
    undrafted = {"num_draft_tokens": None}
    ways = {FULL: {**options, "pruner": "none", **undrafted}, PRUNED: {**whole, **undrafted}}
    return ways if options["num_draft_tokens"] is None else {**ways, DRAFTED: whole}


def compare(
    answer: Callable[..., GenerationResult], ways: Mapping[str, Mapping[str, Any]]
) -> Comparison:
    """Answer in all ways in turns: as many rounds as fit two seconds, but at least three.

    Where three rounds would take longer than half a minute there are fewer, and no gain is clear.
    Answers end at the first token, or where one way drafts after 48 at most. All have answered
    before, so that nothing is cold.
    """
    has_drafts = DRAFTED in ways
    max_tokens = _most_tokens(ways) if has_drafts else 1
    runs: dict[str, list[RunTimes]] = {way: [] for way in ways}
    start, rounds = time.perf_counter(), 0
    with tqdm(
        total=FEWEST * len(ways), desc="comparing", unit="run", file=sys.stderr, delay=SECONDS,
        leave=False,
    ) as bar:  # fmt: skip
        while _goes_on(rounds, time.perf_counter() - start):
            for way, options in ways.items():
                runs[way].append(_timed(partial(answer, **{**options, "max_tokens": max_tokens})))
                bar.update()
            rounds += 1
            if rounds == 1:
                _say_how_long(time.perf_counter() - start)
    return Comparison(runs, has_drafts, max_tokens)


def _most_tokens(ways: Mapping[str, Mapping[str, Any]]) -> int:
    """How long an answer is timed: as it was asked for, and no longer than its speed shows."""
    wanted: list[int] = [options.get("max_tokens", MOST_TOKENS) for options in ways.values()]
    return min(MOST_TOKENS, *wanted)


def _goes_on(rounds: int, seconds: float) -> bool:
    """Whether there is another round after so many rounds, which took so many seconds."""
    if not rounds:
        return True
    fits = seconds * (rounds + 1) / rounds <= MOST_SECONDS
    return fits and (rounds < FEWEST or seconds < SECONDS)


def _say_how_long(round_seconds: float) -> None:
    """A note on comparisons that a user waits for."""
    rounds = max(1, min(FEWEST, int(MOST_SECONDS / max(round_seconds, 1e-9))))
    if round_seconds * rounds > SECONDS:
        with tqdm.external_write_mode(file=sys.stderr):  # above the bar, not inside it
            logger.info("comparing takes about %.0f s: %d rounds", round_seconds * rounds, rounds)


def _timed(answer: Callable[[], GenerationResult]) -> RunTimes:
    start = time.perf_counter()
    result = answer()
    whole, opening = 1000 * (time.perf_counter() - start), result.ttft_ms["image"]
    return RunTimes(
        opening, result.ttft_ms["total"] - opening, whole - opening, result.generation_tokens
    )


def compared_overlay(
    answers: Mapping[str, GenerationResult], comparison: Comparison
) -> Image.Image:
    """What was kept for each answer, side by side, with the answer and its first token below.

    Raises UserError where the prompt had no image.
    """
    pictures = []
    for way, answer in answers.items():
        text = " ".join(answer.text.split())
        text = text if len(text) <= QUOTED else f"{text[:QUOTED]} …"
        tokens = f"{answer.visual_tokens} visual tokens" if way == FULL else answer.caption()
        first = f'{way}: "{text}"' if _is_drawable(text) else f"{way}: {NOT_DRAWN}"
        lines = [first, comparison.first_token_line(way), tokens]
        pictures.append(add_caption(answer.overlay(caption=""), "\n".join(lines)))
    return join_images(pictures)


def _is_drawable(text: str) -> bool:
    """Whether Pillow's own font has its letters."""
    return all(ord(letter) < 0x250 or letter in "…–—‘’“”•" for letter in text)


def comparison_lines(answers: Sequence[GenerationResult], comparison: Comparison) -> list[str]:
    """The lines that close a comparison; the answers are in the order of its ways."""
    full, *_, pruned = answers
    same = "the same answer" if full.token_ids == pruned.token_ids else "another answer"
    kept = f"{pruned.visual_tokens_kept} of {pruned.visual_tokens}"
    return [*comparison.lines, f"Answer: {same} with {kept} visual tokens"]
