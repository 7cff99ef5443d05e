"""A conversation that is answered twice: with all visual tokens, and pruned.

Both answers are those of `Chat`; a turn is kept where both were read to their end.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.photographs import SCENES_ONLY, has_photograph
from ..generation.printing import times_by_part
from ..generation.request import Request
from ..generation.result import GenerationResult
from ..inputs.image import MAX_PIXELS, open_image
from ..models.vlm import VLM
from ..planning import host_budgets
from ..planning.auto_budgets import choose_within
from ..planning.budgets import Budget, BudgetChoice, keep_within
from ..pruners import AUTO
from .model_thread import ModelThread, OpenModel

if TYPE_CHECKING:
    from ..chat import Chat

STOPPED = "stopped: the conversation is as it was before this answer"


@dataclass(frozen=True)
class TokenBudget:
    """A method, and what it keeps of each image: a share of the visual tokens, or as many as fit so
    many milliseconds to the first token."""

    pruner: str
    keep_ratio: float = 1.0
    ms: float | None = None


@dataclass(frozen=True)
class Marks:
    """How far a chat had come: its turns, its images and its latest answer."""

    turns: tuple[Any, ...]
    images: tuple[Image.Image, ...]
    result: GenerationResult | None

    @classmethod
    def of(cls, chat: "Chat") -> "Marks":
        return cls(tuple(chat.turns), tuple(chat.images), chat.result)

    def restore(self, chat: "Chat") -> None:
        """Have the chat be as it was."""
        chat.turns, chat.images, chat.result = [*self.turns], [*self.images], self.result

    @property
    def before_last(self) -> "Marks":
        """The same before the latest turn."""
        *turns, last = self.turns
        return Marks(tuple(turns), self.images[: len(self.images) - last.images], None)


@dataclass
class Conversation:
    """Two chats about the same pictures. Whoever comes while an answer is written waits for it.

    `question` is the one that is being answered, as turn number `number`, and `text` what there is
    of its two answers; `note` is what the latest budget came to.
    """

    opened: OpenModel
    thread: ModelThread
    max_tokens: int

    def __post_init__(self) -> None:
        self.full = self.opened.new_chat(pruner="none", max_tokens=self.max_tokens)
        # What the slider shows is kept, whatever the question.
        self.pruned = self.opened.new_chat(max_tokens=self.max_tokens, caution=False)
        self.question, self.number, self.note = "", 0, ""
        self.text = {"full": "", "pruned": ""}
        self._busy, self._is_stopped = Lock(), False

    def stop(self) -> None:
        """End what is being answered with a UserError at its next piece."""
        self._is_stopped = True

    def ask(self, question: str, files: Sequence[str], budget: TokenBudget) -> Iterator[None]:
        """Answer a question twice, pruned first, a piece at a time. Raises UserError, after which
        the conversation is as it was."""
        with self._busy:
            self._is_stopped = False
            pictures, self.text = open_pictures(files), {"full": "", "pruned": ""}
            before = {chat: Marks.of(chat) for chat in (self.full, self.pruned)}
            try:
                yield from self._answer("pruned", question, pictures, budget)
                yield from self._answer("full", question, pictures, None)
            except BaseException as problem:
                self._restore(before, problem)
                raise
            finally:
                self.question = ""

    def ask_again(self, budget: TokenBudget) -> Iterator[None]:
        """Answer the latest question again, with another budget. Raises UserError, as `ask`."""
        with self._busy:
            self._is_stopped = False
            before = Marks.of(self.pruned)
            if not before.turns:
                return
            last, earlier = before.turns[-1], before.before_last
            pictures = before.images[len(earlier.images) :]
            self.thread.run(earlier.restore, self.pruned)
            try:
                yield from self._answer("pruned", last.question, pictures, budget)
            except BaseException as problem:
                self._restore({self.pruned: before}, problem)
                raise
            finally:
                self.question = ""

    def _restore(self, before: "Mapping[Chat, Marks]", problem: BaseException) -> None:
        """Have the chats be as they were; where nobody reads on, behind what the thread still does,
        since it may be the thread itself that ends this."""
        do = self.thread.start if isinstance(problem, GeneratorExit) else self.thread.run
        for chat, marks in before.items():
            do(marks.restore, chat)

    def messages(self, name: str) -> list[dict[str, str]]:
        """The turns of a chat, `full` or `pruned`, and what there is of the next one."""
        turns = [(turn.question, turn.images, turn.answer) for turn in getattr(self, name).turns]
        if self.question and len(turns) < self.number:
            turns.append((self.question, 0, self.text[name] or "…"))
        return [
            {"role": role, "content": content}
            for question, images, answer in turns
            for role, content in (
                ("user", question if not images else f"{question}\n({pictures_text(images)})"),
                ("assistant", answer or "(empty)"),
            )
        ]

    def _answer(
        self, name: str, question: str, pictures: Sequence[Image.Image], budget: TokenBudget | None
    ) -> Iterator[None]:
        chat: Chat = getattr(self, name)
        self.question, self.number, self.text[name] = question, len(chat.turns) + 1, ""
        if budget:
            options = self.thread.run(self._options, question, pictures, budget)
            self.thread.run(lambda: chat.configure(**options))
        for piece in self.thread.pieces(chat.stream(question, pictures)):
            self.text[name] += piece.text
            yield
            if self._is_stopped:
                raise UserError(STOPPED)

    def _options(
        self, question: str, pictures: Sequence[Image.Image], budget: TokenBudget
    ) -> dict[str, Any]:
        """A budget as options of a chat. Raises UserError."""
        self.note = ""
        images = [*self.pruned.images, *pictures]
        if budget.pruner == "none" or not images:
            return {"pruner": "none", "keep_ratio": None, "keep_tokens": None}
        if budget.ms is None:
            ratio = budget.keep_ratio
            return {"pruner": budget.pruner, "keep_ratio": ratio, "keep_tokens": None}
        choose = partial(self._choose, question, images, budget.ms)
        if budget.pruner == AUTO:
            choice, why = choose_within(self.opened.model, self.opened.processor, choose)
            self.note = why if choice.reason else f"{choice}; {why}"
        else:
            choice = choose(budget.pruner)
            self.note = choice.reason or str(choice)
        if choice.options["pruner"] == "none":
            return {"pruner": "none", "keep_ratio": None, "keep_tokens": None}
        return {**choice.options, "keep_ratio": None}

    def _choose(
        self, question: str, images: Sequence[Image.Image], ms: float, pruner: str
    ) -> BudgetChoice:
        """The tokens that fit so many milliseconds, behind the turns so far. Raises UserError."""
        model, processor = self.opened.model, self.opened.processor
        turns, most = self.pruned.turns, self.max_tokens
        if not isinstance(model, VLM):
            request = Request(question, images, pruner, max_tokens=most, history=tuple(turns))
            return host_budgets.keep_within(model, processor, request, Budget(ms))
        words = [part for turn in turns for part in (turn.question, turn.answer)]
        return keep_within(
            model, processor, "\n".join([*words, question]), images, pruner=pruner, ms=ms,
            max_tokens=most,
        )  # fmt: skip

    @property
    def notes(self) -> str:
        """What is to be said of the latest answers beside their figures."""
        is_photograph = has_photograph(self.opened.processor, self.pruned.images)
        notes = [self.note, SCENES_ONLY if is_photograph else ""]
        return "; ".join(filter(None, notes))


def open_pictures(files: Sequence[str]) -> list[Image.Image]:
    """Uploaded files as pictures. Raises UserError, which names a file as its owner does."""
    pictures = []
    for file in files:
        try:
            pictures.append(open_image(file, MAX_PIXELS))
        except UserError as problem:
            raise UserError(str(problem).replace(file, Path(file).name)) from None
    return pictures


def pictures_text(count: int) -> str:
    return f"with {count} picture{'s' * (count != 1)}"


def figures_line(result: GenerationResult | None) -> str:
    """The figures of an answer, in a line; empty without one."""
    if result is None:
        return ""
    parts = [f"{result.generation_tokens} tokens at {result.generation_tps:.1f} a second"]
    if result.visual_tokens:
        share = result.visual_tokens_kept / result.visual_tokens
        kept = f"{result.visual_tokens_kept} of {result.visual_tokens} visual tokens ({share:.0%})"
        parts.insert(0, kept)
    times = f"first token {result.ttft_ms['total']:.1f} ms ({times_by_part(result.ttft_ms)})"
    memory = f"cache {result.cache_bytes / 1e6:.2f} MB, peak memory {result.peak_memory:.3f} GB"
    return "; ".join([*parts, times, memory, *filter(None, [result.auto])])


def overlay_of(result: GenerationResult | None) -> Image.Image | None:
    """The picture of what an answer kept; None where there was no image."""
    return result.overlay() if result and result.views else None
