"""From a record of any format to an example: whose turn it is, and which images are meant."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...evaluation.questions.records import RecordError, image_file, text_field, text_list_field
from ..examples import Example, Picture

# Who speaks, by the names that MiniMind-V and chat templates, and that LLaVA give them.
SPEAKERS = {
    "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "system": "system",
}  # fmt: skip
KEYS = (("role", "content"), ("from", "value"))  # of a turn: who speaks, and what
CONVERSATIONS = ("conversations", "messages")


def example_of(record: dict[str, Any], images: Path, where: str) -> Example:
    """The example of a JSON object. Raises RecordError.

    It has `image` or `images` (paths in the folder `images`) or none, and `conversations`, or
    `question` and `answer`.
    """
    pictures = tuple(image_path(images, name) for name in _image_names(record, images))
    for key in CONVERSATIONS:
        if key in record:
            return conversation(record[key], pictures, where)
    answer = "answer"
    if isinstance(record.get(answer), list):  # all are right
        record = {**record, answer: text_list_field(record, answer)[0]}
    pair = (text_field(record, "question"), text_field(record, answer))
    return Example(pictures, (pair,), where)


def conversation(turns: Any, pictures: Sequence[Picture], where: str) -> Example:
    """The example of a list of turns. Raises RecordError.

    A system turn may stand first. What an assistant says before the first question, and a last
    question without an answer, are left out, as LLaVA's authors do.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RecordError("conversations is not a list of turns")
    spoken = [_spoken(turn) for turn in turns]
    system = spoken.pop(0)[1] if spoken and spoken[0][0] == "system" else ""
    if spoken and spoken[0][0] == "assistant":
        spoken.pop(0)
    if spoken and spoken[-1][0] == "user":
        spoken.pop()
    for n, (speaker, _) in enumerate(spoken):
        if speaker == "system":
            raise RecordError("a system turn does not stand first")
        if speaker != ("user", "assistant")[n % 2]:
            raise RecordError("turns of user and assistant do not alternate")
    if not spoken:
        raise RecordError("no question has an answer")
    texts = [text for _, text in spoken]
    pairs = tuple(zip(texts[::2], texts[1::2], strict=True))
    return Example(tuple(pictures), pairs, where, system)


def image_path(folder: Path, name: str) -> Path:
    """The path of an image. Raises RecordError where there is no such file."""
    if not name.strip():
        raise RecordError("the name of an image is empty")
    return image_file(folder, name)


def _spoken(turn: dict[str, Any]) -> tuple[str, str]:
    """Who speaks, and what."""
    speaker_key, text_key = next((keys for keys in KEYS if keys[0] in turn), KEYS[0])
    speaker = text_field(turn, speaker_key)
    if speaker not in SPEAKERS:
        raise RecordError(
            f"a turn's {speaker_key} is {speaker[:40]!r}; it may be {', '.join(SPEAKERS)}"
        )
    return SPEAKERS[speaker], text_field(turn, text_key)


def _image_names(record: dict[str, Any], folder: Path) -> list[str]:
    """`images`, or `image`: a name, several of them, or several between commas as MiniMind-V had
    them at first."""
    if record.get("images") is not None:
        return text_list_field(record, "images") if record["images"] != [] else []
    if record.get("image") is None:
        return []
    if isinstance(record["image"], list):
        return text_list_field(record, "image")
    name = text_field(record, "image")
    try:
        image_file(folder, name)
    except RecordError:
        names = [part.strip() for part in name.split(",")]
        return names if len(names) > 1 else [name]
    return [name]
