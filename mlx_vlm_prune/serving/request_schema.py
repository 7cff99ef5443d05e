"""The JSON of a chat request, as OpenAI has it, with our fields beside its own."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .refusals import RequestRefusedError

MOST_MESSAGES = MOST_PARTS = 1_000  # of a request, of a message
MOST_STOPS, LONGEST_STOP = 16, 1_000  # texts, characters
LONGEST_NAME = 1_000  # characters

Detail = Literal["auto", "low", "high"]
Name = Annotated[str, Field(max_length=LONGEST_NAME)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


def as_parts(content: Any) -> Any:
    """A message's content as a list of parts: a text alone is one."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_list(stop: Any) -> Any:
    """Texts at which an answer ends as a list: one alone is one."""
    return [stop] if isinstance(stop, str) else stop


def as_link(url: Any) -> Any:
    """A URL as an object that has it: a text alone is one."""
    return {"url": url} if isinstance(url, str) else url


# Fields that change no answer here, or that ask for what is done anyway.
HARMLESS = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
    "parallel_tool_calls", "name",
}  # fmt: skip
OFF: dict[str, Any] = {  # values of OpenAI's other fields that ask for nothing
    "n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0, "frequency_penalty": 0,
    "response_format": {"type": "text"}, "tool_choice": "none", "tools": [], "logit_bias": {},
    "modalities": ["text"],
}  # fmt: skip


class Part(BaseModel):
    """What all parts of a request share: unknown fields are kept, to be named."""

    model_config = ConfigDict(extra="allow", strict=True)


class ImageUrl(Part):
    """A picture, as a `data:` URI or a URL."""

    url: str
    detail: Detail | None = None


class ImagePart(Part):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(as_link)]


class TextPart(Part):
    """A text in a message."""

    type: Literal["text"]
    text: str


class VideoUrl(Part):
    """A clip, as a `data:` URI or a URL, and which of its frames are taken."""

    url: str
    fps: float | None = None
    max_frames: int | None = None


class VideoPart(Part):
    """A clip in a message, as servers of open models have it; OpenAI's has none."""

    type: Literal["video_url"]
    video_url: Annotated[VideoUrl, BeforeValidator(as_link)]


PART_KINDS = ("text", "image_url", "video_url")
AnyPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


def link_of(part: ImagePart | VideoPart) -> ImageUrl | VideoUrl:
    """What is shown."""
    return part.image_url if isinstance(part, ImagePart) else part.video_url


Content = Annotated[
    list[AnyPart], Field(max_length=MOST_PARTS, fail_fast=True), BeforeValidator(as_parts)
]
Stops = Annotated[
    list[Stop], Field(max_length=MOST_STOPS, fail_fast=True), BeforeValidator(as_list)
]


class Message(Part):
    """A turn, or what the system says."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = None


class StreamOptions(Part):
    """Whether the stream ends with the figures of `usage`."""

    include_usage: bool | None = None


class ChatBody(Part):
    """The body of /v1/chat/completions."""

    model: Name | None = None
    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    ]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    stop: Stops | None = None
    visual_tokens: int | None = None
    keep_ratio: float | None = None
    pruner: Name | None = None
    budget_ms: float | None = None
    strict: bool | None = None

    @property
    def unknown_fields(self) -> list[str]:
        """The fields that are not followed here, by their place."""
        return sorted(_unknown(self, ""))

    @property
    def links(self) -> list[ImageUrl | VideoUrl]:
        """All pictures and clips."""
        parts = [part for message in self.messages for part in message.content or ()]
        return [link_of(part) for part in parts if not isinstance(part, TextPart)]


def _unknown(part: Any, place: str) -> list[str]:
    if isinstance(part, list):
        return [name for i, each in enumerate(part) for name in _unknown(each, f"{place}[{i}]")]
    if not isinstance(part, Part):
        return []
    prefix = f"{place}." if place else ""
    names = [
        prefix + name
        for name, value in (part.model_extra or {}).items()
        if value is not None and name not in HARMLESS and OFF.get(name, NotImplemented) != value
    ]
    for name in type(part).model_fields:
        names += _unknown(getattr(part, name), prefix + name)
    return names


def check_body(content: Any) -> ChatBody:
    """A request's JSON, checked. Raises RequestRefusedError, which names the first wrong field."""
    if not isinstance(content, dict):
        raise RequestRefusedError("the body is no JSON object")
    try:
        return ChatBody.model_validate(content)
    except ValidationError as problem:
        first = problem.errors(include_url=False, include_context=False)[0]
        place = _place(first["loc"])
        raise RequestRefusedError(f"{place}: {_sentence(first)}", field=place) from None
    except RecursionError:
        raise RequestRefusedError("the body is nested too deeply") from None


def _place(path: tuple[int | str, ...]) -> str:
    """Where a field is: `messages[0].content[1].text`, without the part's kind, which pydantic puts
    behind its number."""
    place = ""
    for before, step in zip((None, *path), path, strict=False):
        if isinstance(step, int):
            place += f"[{step}]"
        elif not (isinstance(before, int) and step in PART_KINDS):
            place += f".{step}" if place else step
    return place or "the body"


def _sentence(error: Any) -> str:
    """pydantic's message as the end of a sentence."""
    text = "must be a JSON object" if error["type"] == "model_type" else str(error["msg"])
    return text[:1].lower() + text[1:]
