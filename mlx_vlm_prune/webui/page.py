"""The page of the app, in Gradio: a question, two answers to it, and what was kept for the second.

What a user, a model or a file wrote is shown as plain text: nothing of it is Markdown or HTML.
"""

import logging
from collections.abc import Iterator
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import gradio as gr

from ..checkpoints.command_line import on_a_line, sentence_of
from ..checkpoints.errors import reason
from ..generation.result import GenerationResult
from ..pruners import AUTO, METHODS, PRESETS
from ..scenes import HELD_OUT_SEEDS, question_set
from . import BUILT_IN
from .conversations import Conversation, TokenBudget, figures_line, overlay_of
from .model_thread import Models, ModelThread, OpenModel

logger = logging.getLogger("mlx_vlm_prune")
Updates = dict[Any, Any]  # new values of components
TITLE = "mlx_vlm_prune"
ABOUT = """# Fewer visual tokens
Ask about a picture. It is answered twice: with all visual tokens, and with those that a method
keeps. Moving the slider answers the latest question again."""
FONT = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
CSS = """
.gradio-container { max-width: 76rem !important; margin: 0 auto !important; }
#notice textarea { font-weight: 600; }
#notice, .figures { overflow-wrap: anywhere; }
#method input, #folder input { padding-right: 1.75rem; text-overflow: ellipsis; }
#percent .min_value, #percent .max_value { color: var(--body-text-color); }
footer { display: none !important; }
"""
SHARE, MILLISECONDS = "share of the tokens", "milliseconds"
DEFAULT_PERCENT, DEFAULT_MS = 50, 300
EXAMPLES = 3
CLIENTS = 16  # whose answers are written at once
AUTO_EXPLAINED = "Choose the method by what is known of the model, and say why beside the figures."
NAMES = {"full": "All visual tokens", "pruned": "Pruned"}
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}


class Page:
    """The components and what they do. A tab of a browser has a conversation of its own."""

    def __init__(self, models: Models, thread: ModelThread, folder: Path, max_tokens: int) -> None:
        self.models, self.thread, self.max_tokens = models, thread, max_tokens
        first = models.open(models.first)
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
            self.blocks = blocks
            self.talk = gr.State()
            gr.Markdown(ABOUT)
            self._add_model(first)
            self._add_budget(first)
            self._add_question(folder)
            self._add_answers()
            self._connect()

    def _add_model(self, first: OpenModel) -> None:
        folders = [str(file.parent) for file in sorted(Path().glob("*/config.json"))]
        with gr.Accordion(model_label(first), open=False, elem_id="model") as self.model:
            names = dict.fromkeys([first.name, BUILT_IN, *folders])
            self.folder = gr.Dropdown(
                [*names], value=first.name, allow_custom_value=True, label="Folder of a model",
                info="one of these, or type where another lies; the conversation begins again",
                elem_id="folder",
            )  # fmt: skip
            self.open = gr.Button("Open the model")

    def _add_budget(self, first: OpenModel) -> None:
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self.pruner = gr.Dropdown(
                    menu(first), value=AUTO,
                    allow_custom_value=True, label="Method",
                    info="or a chain, NAME:option=value+NAME", elem_id="method",
                )  # fmt: skip
                self.about = gr.Markdown(explanation(AUTO))
            with gr.Column(scale=2, min_width=280):
                self.unit = gr.Radio([SHARE, MILLISECONDS], value=SHARE, label="Budget")
                self.percent = gr.Slider(
                    1, 100, DEFAULT_PERCENT, step=1, label="Visual tokens that are kept, %",
                    elem_id="percent",
                )  # fmt: skip
                self.ms = gr.Number(
                    DEFAULT_MS, label="Time to the first token, ms", visible=False, minimum=1,
                    info="predicted from a calibration of this machine: seconds or minutes, once",
                    elem_id="ms",
                )  # fmt: skip

    def _add_answers(self) -> None:
        """Figures and pictures are there once there is an answer."""
        self.chats, self.figures, self.pictures = {}, {}, {}
        with gr.Row():
            for name, title in NAMES.items():
                with gr.Column(min_width=280):
                    self.chats[name] = gr.Chatbot(
                        label=title, height=260, render_markdown=False, buttons=[],
                        feedback_options=None, latex_delimiters=[], allow_tags=False,
                        elem_id=f"{name}-chat",
                    )  # fmt: skip
                    self.pictures[name] = gr.Image(
                        label=f"{title}: picture", show_label=False, format="png", height=300,
                        interactive=False, buttons=["fullscreen"], visible=False,
                        elem_id=f"{name}-picture",
                    )  # fmt: skip
                    self.figures[name] = gr.Textbox(
                        label=f"{title}: figures", interactive=False, lines=2, max_lines=16,
                        visible=False, elem_id=f"{name}-figures", elem_classes=["figures"],
                    )  # fmt: skip

    def _add_question(self, folder: Path) -> None:
        self.question = gr.MultimodalTextbox(
            label="Question", placeholder="Ask about a picture", file_count="multiple",
            max_plain_text_length=100_000, elem_id="question",
            html_attributes=gr.InputHTMLAttributes(autocorrect="off", spellcheck=False),
        )  # fmt: skip
        self.notice = gr.Textbox(
            label="Notice", visible=False, interactive=False, elem_id="notice", max_lines=6
        )
        with gr.Row():
            self.stop = gr.Button("Stop", size="sm", min_width=120)
            self.clear = gr.Button("Begin again", size="sm", min_width=120)
        questions = examples(folder)
        gr.Examples(
            questions, self.question, label="About drawn scenes", cache_examples=False,
            example_labels=[question["text"] for (question,) in questions], elem_id="examples",
        )  # fmt: skip

    def _connect(self) -> None:
        budget = [self.pruner, self.unit, self.percent, self.ms]
        shown = [
            *self.chats.values(), *self.figures.values(), *self.pictures.values(), self.notice,
        ]  # fmt: skip
        writing: dict[str, Any] = {**PRIVATE, "concurrency_limit": CLIENTS}
        self.question.submit(
            self.ask, [self.talk, self.question, *budget], [self.talk, self.question, *shown],
            **writing,
        )  # fmt: skip
        gr.on(
            [self.percent.input, self.pruner.input, self.ms.submit, self.unit.input],
            self.ask_again, [self.talk, *budget], shown, trigger_mode="always_last", **writing,
        )  # fmt: skip
        self.pruner.change(explanation, self.pruner, self.about, **PRIVATE)
        self.unit.change(budget_fields, self.unit, [self.percent, self.ms], **PRIVATE)
        gr.on(
            [self.clear.click, *(chat.clear for chat in self.chats.values())],
            self.begin, self.talk, [self.talk, *shown], **PRIVATE,
        )  # fmt: skip
        self.stop.click(stop, self.talk, **PRIVATE)
        self.open.click(
            self.open_model, self.folder, [self.talk, self.model, self.pruner, *shown], **PRIVATE
        )

    def ask(
        self, talk: Conversation | None, question: dict[str, Any], *budget: Any
    ) -> Iterator[Updates]:
        """Answer a question, a piece at a time."""
        text, files = (question.get("text") or "").strip(), question.get("files") or []
        if not text:
            yield {self.notice: notice("type a question")}
            return
        try:
            talk = talk or self._conversation_with(self.models.open(self.models.first))
        except Exception as problem:
            yield {self.notice: notice(fault_text(problem))}
            return
        start = {self.talk: talk, self.question: gr.MultimodalTextbox(None)}
        yield from self._write(talk, talk.ask(text, files, budget_of(*budget)), start)

    def ask_again(self, talk: Conversation | None, *budget: Any) -> Iterator[Updates]:
        """Answer the latest question with another budget, where there is one."""
        if talk and talk.pruned.turns:
            yield from self._write(talk, talk.ask_again(budget_of(*budget)), {})

    def begin(self, talk: Conversation | None) -> Updates:
        """Begin again, with the same model."""
        if talk is None:  # nothing was asked yet
            return {self.notice: notice("")}
        return self._new(self._conversation_with(talk.opened))

    def open_model(self, name: str | None) -> Updates:
        """Begin again with another model; a mistake is a sentence, and the conversation goes on."""
        try:
            opened = self.models.open(name or "")
            methods = gr.Dropdown(menu(opened), value=AUTO)
            new = self._new(self._conversation_with(opened))
        except Exception as problem:
            return {self.notice: notice(fault_text(problem))}
        return {
            **new,
            self.model: gr.Accordion(label=model_label(opened)),
            self.pruner: methods,
        }

    def _conversation_with(self, opened: OpenModel) -> Conversation:
        return Conversation(opened, self.thread, self.max_tokens)

    def _new(self, talk: Conversation) -> Updates:
        return {self.talk: talk, **self.thread.run(self._whole, talk), self.notice: notice("")}

    def _write(
        self, talk: Conversation, pieces: Iterator[None], start: Updates
    ) -> Iterator[Updates]:
        """The chats as an answer is written, at its end all of it, or why there is none."""
        try:
            for _ in pieces:
                yield {**start, **self.thread.run(self._chats, talk), self.notice: notice("")}
                start = {}
        except Exception as problem:
            whole = self.thread.run(self._whole, talk)
            yield {**whole, self.notice: notice(fault_text(problem))}
            return
        yield {**self.thread.run(self._whole, talk), self.notice: notice(talk.notes)}

    def _chats(self, talk: Conversation) -> Updates:
        return {chat: as_text(talk.messages(name)) for name, chat in self.chats.items()}

    def _whole(self, talk: Conversation) -> Updates:
        results = {"full": talk.full.result, "pruned": talk.pruned.result}
        return {
            **self._chats(talk),
            **{
                self.figures[name]: if_any(figures_line(result)) for name, result in results.items()
            },
            **{self.pictures[name]: picture_of(result) for name, result in results.items()},
        }


def stop(talk: Conversation | None) -> None:
    """End the answer that is being written, if there is one."""
    if talk:
        talk.stop()


def as_text(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Messages for a `Chatbot`, which takes them as HTML, also where it renders no Markdown."""
    return [{**message, "content": escape(message["content"], quote=False)} for message in messages]


def model_label(opened: OpenModel) -> str:
    return f"Model: {opened}"


def menu(opened: OpenModel) -> list[tuple[str, str]]:
    """`auto`, and the methods of a model, each with what it does."""
    return [(f"{name}: {explanation(name)}", name) for name in (AUTO, *opened.methods)]


def explanation(spec: str | None) -> str:
    """What each method of a chain does, by its own file."""
    if spec == AUTO:
        return AUTO_EXPLAINED
    names = [part.partition(":")[0] for part in PRESETS.get(spec or "", spec or "").split("+")]
    steps = [METHODS[name].summary for name in names if name in METHODS]
    if len(steps) == 1:
        return steps[0]
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, 1))


def budget_of(pruner: str | None, unit: str, percent: float, ms: float | None) -> TokenBudget:
    """The budget that the fields say; without a number of milliseconds a very short time."""
    return TokenBudget(
        (pruner or "none").strip(), percent / 100, (ms or 1.0) if unit == MILLISECONDS else None
    )


def budget_fields(unit: str) -> list[Any]:
    """The field of the chosen unit is shown, the other is not."""
    is_ms = unit == MILLISECONDS
    return [gr.Slider(visible=not is_ms), gr.Number(visible=is_ms)]


def fault_text(problem: Exception) -> str:
    """What is said of an error; of one that is no mistake, also on stderr."""
    sentence = sentence_of(problem)
    if sentence is None:
        sentence = f"this failed with {type(problem).__name__}: {reason(problem)}"
        logger.error(sentence)
    return sentence


def if_any(value: Any, **properties: Any) -> Any:
    """The new value of a component, which is there only with one."""
    return gr.update(value=value or None, visible=bool(value), **properties)


def picture_of(result: GenerationResult | None) -> Any:
    """What an answer kept, as a picture that a screen reader can name."""
    picture = overlay_of(result)
    if result is None or picture is None:
        return if_any(None)
    kept = f"{result.visual_tokens_kept} of {result.visual_tokens} visual tokens"
    return if_any(picture, alt_text=f"The picture, of which {kept} were kept")


def notice(sentence: str) -> Any:
    """A sentence above the question; none where it is empty."""
    return gr.Textbox(on_a_line(sentence), visible=bool(sentence))


def examples(folder: Path) -> list[list[dict[str, Any]]]:
    """Questions about scenes that the built-in model has never seen, whose pictures are written."""
    chosen = []
    for number, (scene, questions) in enumerate(islice(question_set(HELD_OUT_SEEDS, 9), EXAMPLES)):
        file = folder / f"scene-{number + 1}.png"
        scene.image().save(file)
        chosen.append([{"text": questions[-1 - number].text, "files": [str(file)]}])
    return chosen
