"""The text of a prompt, by mlx-vlm's chat template, and what the model's processor makes of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checkpoints.errors import UserError, whole_reason
from ..checkpoints.tokenizer_trial import is_panic, library_errors
from ..inputs.messages import Turn
from .host import Host
from .prepared_inputs import PreparedInputs


def check_prompt(host: Host, prompt: str, more_marks: Sequence[str] = ()) -> None:
    """Raises UserError for a prompt that has what stands for an image, or another of the marks."""
    for mark in (*host.image_marks, *more_marks):
        if mark in prompt:
            raise UserError(
                f"leave {mark} out of the prompt: in mlx-vlm models the chat template says where"
                f" {'videos' if mark in more_marks else 'images'} go"
            )


def processed(
    host: Host, text: str, part: str, process: Callable[[], PreparedInputs]
) -> PreparedInputs:
    """What the model's processor makes of a text and its `part`, such as images, checked.

    Raises UserError.
    """
    host.try_text(text)
    try:
        inputs = process()
    except UserError:
        raise
    except BaseException as problem:  # processors and tokenizers raise whatever comes
        if not (is_panic(problem) or isinstance(problem, Exception)):
            raise
        raise UserError(f"mlx-vlm cannot prepare the {part}: {whole_reason(problem)}") from problem
    host.check_ids(inputs)
    return inputs


def question_text(host: Host, prompt: str, images: int, options: dict[str, Any]) -> str:
    """The text of a question alone. Raises UserError where the template fails."""
    from mlx_vlm.prompt_utils import apply_chat_template

    config, images = host.template_config(images)
    with library_errors(_failing(host)):
        turns = apply_chat_template(
            None, config, prompt, return_messages=True, num_images=images, **options
        )
        host.check_template(turns, options)
        text: str = apply_chat_template(
            host.processor, config, prompt, num_images=images, **options
        )
    return text


def conversation_text(
    host: Host,
    history: Sequence[Turn],
    prompt: str,
    images: int,
    options: dict[str, Any],
    system: str | None,
) -> str:
    """The text of several turns behind a system message; each question has its images where mlx-vlm
    puts those of a prompt alone. Raises UserError for a model that reads none of these."""
    latest = Turn(prompt, images - sum(turn.images for turn in history), "")
    with library_errors(_failing(host)):
        turns = conversation_messages(host, [*history, latest], system, options)
    if not all(isinstance(message, dict) for message in turns):
        if not history:
            raise UserError(f"a {host.kind} model reads one question and no system message")
        raise UserError(f"a {host.kind} model reads one question and no earlier turns; begin again")
    return rendered(host, turns, options, system)


def conversation_messages(
    host: Host, turns: Sequence[Turn], system: str | None, options: Mapping[str, Any],
    of_first: Mapping[str, Any] | None = None,
) -> list[Any]:  # fmt: skip
    """The messages of turns behind a system message; the last one has no answer yet. The first
    question has options of its own, for example a clip."""
    conversation = system_turns(host, system, options)
    for number, turn in enumerate(turns):
        more = {} if number else of_first or {}
        conversation += messages(host, turn.question, turn.images, **options, **more)
        if turn is not turns[-1]:
            conversation += answer_messages(host, turn, options)
    return conversation


def messages(host: Host, turn: Any, images: int, **options: Any) -> list[Any]:
    """The messages that mlx-vlm makes of a question with so many images, or of other turns."""
    from mlx_vlm.prompt_utils import apply_chat_template

    config, images = host.template_config(images)
    parts: list[Any] = apply_chat_template(
        None, config, turn, return_messages=True, num_images=images, **options
    )
    return parts


def answer_messages(host: Host, turn: Turn, options: Mapping[str, Any]) -> list[Any]:
    """The messages of an earlier answer."""
    message = {"role": "assistant", "content": turn.answer.strip()}
    return messages(host, [message], 0, **options)


def system_turns(host: Host, system: str | None, options: Mapping[str, Any]) -> list[Any]:
    """The messages of a system message, where there is one."""
    if system is None:
        return []
    return messages(host, [{"role": "system", "content": system}], 0, **options)


def rendered(
    host: Host, turns: Sequence[Any], options: Mapping[str, Any], system: str | None
) -> str:
    """Messages through the chat template. Raises UserError where it fails, or drops the system
    message."""
    from mlx_vlm.prompt_utils import get_chat_template

    with library_errors(_failing(host)):
        host.check_template(turns, options)
        text: str = get_chat_template(host.processor, list(turns), True, **options)
    if system is not None and system.strip() not in text:
        raise UserError(f"the chat template of this {host.kind} model drops the system message")
    return text


def _failing(host: Host) -> str:
    return f"the chat template of this {host.kind} model fails"
