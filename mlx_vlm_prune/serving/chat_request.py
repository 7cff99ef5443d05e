"""From a checked body to what a model is asked: turns, opened pictures, a budget, warnings."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..inputs.image import MAX_PIXELS, MOST_PIXELS, open_image
from ..inputs.image_sources import DATA_URI, URLS
from ..inputs.messages import Turn
from ..inputs.placement import stored_image
from .refusals import Notes, RequestRefusedError
from .request_schema import ChatBody, ImagePart, ImageUrl, Message
from .settings import MAX_SIDE_RATIO, ServerSettings
from .visual_budget import VisualBudget, visual_budget

SYSTEM = ("system", "developer")
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered; an answer ends at a text in `stop`."""

    request: Request
    budget: VisualBudget
    stop: list[str]
    notes: Notes


def read_chat_request(body: ChatBody, settings: ServerSettings) -> ChatRequest:
    """A request with its pictures opened. Raises RequestRefusedError."""
    texts, links = read_turns(body.messages)
    if len(links) > settings.max_images:
        raise RequestRefusedError(
            f"there are {len(links)} pictures; a request may have {settings.max_images}",
            field="messages",
        )
    notes = Notes(bool(body.strict))
    if body.model not in (None, "", "default", settings.model_name):
        notes.warn(
            f"model is {body.model!r}; this server has {settings.model_name!r} alone", "model", 404
        )
    for name in body.unknown_fields:
        notes.warn(f"{name} is not possible here and was ignored", name)
    budget, warnings = visual_budget(body, [link.detail for _, link in links], settings)
    for sentence in warnings:
        notes.warn(sentence, "detail")
    pictures = [
        fit_picture(n, open_picture(n, link, settings), settings.max_pixels, notes)
        for n, (_, link) in enumerate(links, 1)
    ]
    counts = [sum(turn == n for turn, _ in links) for n in range(len(texts))]
    request = build_request(body, texts, counts, pictures)
    stop = [body.stop] if isinstance(body.stop, str) else [*(body.stop or ())]
    return ChatRequest(request, budget, [text for text in stop if text], notes)


def read_turns(messages: Sequence[Message]) -> tuple[list[str], list[tuple[int, ImageUrl]]]:
    """The texts of a conversation and its pictures, each with the number of its text.

    Texts are the system's ("" without one), then questions and answers in turns. Raises
    RequestRefusedError for what is no conversation that ends in a question.
    """
    system = [text_of(message, i) for i, message in enumerate(messages) if message.role in SYSTEM]
    rest = [(i, message) for i, message in enumerate(messages) if message.role not in SYSTEM]
    roles = [message.role for _, message in rest]
    is_in_turns = all(a != b for a, b in pairwise(roles))
    if not rest or roles[0] != "user" or roles[-1] != "user" or not is_in_turns:
        raise RequestRefusedError(
            "messages must be questions of the user and answers of the assistant in turns, and end"
            " in a question",
            field="messages",
        )
    texts = ["\n".join(system), *(text_of(message, i) for i, message in rest)]
    links = [
        (n, part.image_url)
        for n, (i, message) in enumerate(rest, 1)
        for part in _parts(message)
        if isinstance(part, ImagePart) and _is_users(message, i)
    ]
    return texts, links


def text_of(message: Message, number: int) -> str:
    """All texts of a message, a line each."""
    if message.content is None and message.role != "assistant":
        raise RequestRefusedError(f"messages[{number}] has no content", field="messages")
    if not isinstance(message.content, list):
        return message.content or ""
    if any(isinstance(part, ImagePart) for part in message.content):
        _is_users(message, number)
    return "\n".join(part.text for part in message.content if not isinstance(part, ImagePart))


def _parts(message: Message) -> list[object]:
    return [*message.content] if isinstance(message.content, list) else []


def _is_users(message: Message, number: int) -> bool:
    """Raises RequestRefusedError for a picture that is not the user's."""
    if message.role != "user":
        raise RequestRefusedError(
            f"messages[{number}] of the {message.role} has a picture; only the user's can",
            field="messages",
        )
    return True


def build_request(
    body: ChatBody, texts: Sequence[str], images: Sequence[int], pictures: list[Image.Image]
) -> Request:
    """The arguments of an answer, without a budget; `images` has how many come with each text.

    Raises RequestRefusedError.
    """
    system, *talk = texts
    _, *counts = images
    history = [
        Turn(talk[n], counts[n], talk[n + 1]) for n in range(0, len(talk) - 1, 2)
    ]  # fmt: skip
    options = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")
        if (value := getattr(body, name)) is not None
    }
    if body.seed is not None:
        options["seed"] = body.seed % 2**63  # OpenAI's may be negative
    longest = body.max_completion_tokens or body.max_tokens
    if 0 in (body.max_completion_tokens, body.max_tokens):
        longest = 0
    try:
        return Request(
            talk[-1], pictures, system=system or None, history=tuple(history),
            max_tokens=DEFAULT_MAX_TOKENS if longest is None else longest,
            max_pixels=MOST_PIXELS, **options,
        )  # fmt: skip
    except UserError as problem:
        raise RequestRefusedError(str(problem)) from None


def open_picture(number: int, link: ImageUrl, settings: ServerSettings) -> Image.Image:
    """A picture of a request, decoded. Raises RequestRefusedError, which says which one it is.

    No path is ever opened and no URL fetched: a picture is a `data:` URI.
    """
    is_data = link.url[: len(DATA_URI)].lower() == DATA_URI
    try:
        if not is_data and link.url.lower().startswith(URLS):
            raise UserError("it is a URL, and this server fetches none; send a data: URI")
        if not is_data:
            raise UserError("it is no data: URI")
        picture = open_image(
            DATA_URI + link.url[len(DATA_URI) :], max(MAX_PIXELS, settings.max_pixels)
        )
        check_shape(picture)
    except UserError as problem:
        sentence = f"picture {number}: {problem}"
        raise RequestRefusedError(sentence, field="image_url") from None
    return picture


def check_shape(picture: Image.Image) -> None:
    """Raises UserError for a picture so thin that it would be all enlargement."""
    if max(picture.size) > MAX_SIDE_RATIO * min(picture.size):
        raise UserError(
            f"it has {picture.width} x {picture.height} pixels; the longer side may be"
            f" {MAX_SIDE_RATIO} times the shorter one"
        )


def fit_picture(number: int, picture: Image.Image, max_pixels: int, notes: Notes) -> Image.Image:
    """The picture with at most so many pixels; a warning where it is smaller than in its file."""
    stored = stored_image(picture)
    width, height = stored.size[::-1] if stored.orientation > 4 else stored.size
    factor = (max_pixels / (picture.width * picture.height)) ** 0.5
    if factor < 1:
        size = (max(1, int(picture.width * factor)), max(1, int(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    if picture.size != (width, height):
        notes.warn(
            f"picture {number} has {width} x {height} pixels and the server allows {max_pixels}; it"
            f" is read as {picture.width} x {picture.height}",
            "image_url",
        )
    return picture
