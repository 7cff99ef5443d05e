"""From a checked body to what a model is asked: turns, what they show, a budget, warnings."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ..checkpoints.errors import UserError, short
from ..generation.request import Request
from ..inputs.image import MOST_PIXELS
from ..inputs.messages import Turn
from ..inputs.video import Clip
from .clips import open_clip
from .open_requests import OpenRequest
from .pictures import Downloads, fit_picture, open_picture
from .refusals import Notes, RequestRefusedError, in_api_words
from .request_schema import ChatBody, ImageUrl, VideoUrl
from .settings import ServerSettings
from .turns import read_turns
from .visual_budget import VisualBudget, visual_budget

DEFAULT_MAX_TOKENS = 512
CLIP_WITHOUT_TIME = "budget_ms is for pictures: all visual tokens of the video were kept"
MOST_FIELDS_NAMED = 20  # of those that are not followed


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered; an answer ends at a text in `stop`."""

    request: Request
    budget: VisualBudget
    stop: list[str]
    notes: Notes
    gives_max_tokens: bool = False  # else their number is ours
    is_stream: bool = False
    with_usage: bool = False  # at the end of the stream

    def forget_pictures(self) -> None:
        """Let go of them: the prompt was read, and only its answer is still being written."""
        assert isinstance(self.request.images, list)
        self.request.images.clear()
        if isinstance(self.request.video, Clip):
            self.request.video.frames.clear()


def read_chat_request(
    body: ChatBody, downloads: Downloads, settings: ServerSettings, open_request: OpenRequest
) -> ChatRequest:
    """A request with its pictures or its clip opened, which it then holds in place of its body.
    Raises RequestRefusedError."""
    notes = Notes(bool(body.strict))
    note_fields(body, settings, notes)
    turns = read_turns(body.messages, settings.places_pictures, notes)
    budget, warnings = visual_budget(body, [link.detail for _, link in turns.pictures], settings)
    for sentence in warnings:
        notes.warn(sentence, "detail")
    if turns.clip and budget.budget_ms is not None:
        if body.budget_ms is not None:
            notes.warn(CLIP_WITHOUT_TIME, "budget_ms")
        budget = VisualBudget()
    links = [link for _, link in turns.pictures]
    seen: list[Image.Image] | Clip
    if turns.clip:
        seen = open_clip(turns.clip, downloads, settings, open_request, notes)
    else:
        seen = open_pictures(links, downloads, settings, open_request, notes)
    counts = [sum(turn == n for turn, _ in turns.pictures) for n in range(len(turns.texts))]
    request = build_request(body, turns.texts, counts, seen)
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    stop = [text for text in body.stop or () if text]
    gives_max_tokens = (body.max_completion_tokens or body.max_tokens) is not None
    return ChatRequest(
        request, budget, stop, notes, gives_max_tokens, bool(body.stream), with_usage
    )


def note_fields(body: ChatBody, settings: ServerSettings, notes: Notes) -> None:
    """Note another model, and what is not followed. Raises RequestRefusedError where strict."""
    if body.model not in (None, "", "default", settings.model_name):
        sentence = f"model is {short(body.model)}; this server has {settings.model_name!r} alone"
        notes.warn(sentence, "model", 404)
    names = body.unknown_fields
    for name in names[:MOST_FIELDS_NAMED]:
        name = name if len(name) <= 100 else f"{name[:100]}…"
        notes.warn(f"{name} is not possible here and was ignored", name)
    if len(names) > MOST_FIELDS_NAMED:
        notes.warn(f"{len(names) - MOST_FIELDS_NAMED} more fields are not possible here")


def check_links(links: Sequence[ImageUrl | VideoUrl], settings: ServerSettings) -> None:
    """Raises RequestRefusedError for more pictures than the server allows, and for videos that the
    model does not read, before any is downloaded or opened."""
    clips = sum(isinstance(link, VideoUrl) for link in links)
    pictures = len(links) - clips
    if pictures > settings.max_images:
        raise RequestRefusedError(
            f"there are {pictures} pictures; a request may have {settings.max_images}",
            field="messages",
        )
    if clips and settings.why_no_clips:
        raise RequestRefusedError(
            f"the model reads no video: {settings.why_no_clips}", 400, "messages"
        )
    if clips > 1:
        raise RequestRefusedError(f"a chat has one video; there are {clips}", field="messages")


def open_pictures(
    links: Sequence[ImageUrl], downloads: Downloads, settings: ServerSettings,
    open_request: OpenRequest, notes: Notes,
) -> list[Image.Image]:  # fmt: skip
    """All pictures of a request, none with more pixels than the server allows."""
    pictures, body_bytes, nbytes = [], open_request.nbytes, 0
    for number, link in enumerate(links, 1):
        opened = open_picture(number, link, downloads, settings)
        pictures.append(fit_picture(number, opened, settings.max_pixels, notes))
        nbytes += 3 * pictures[-1].width * pictures[-1].height  # as RGB
        open_request.hold(body_bytes + nbytes)
    open_request.hold(nbytes)
    return pictures


def build_request(
    body: ChatBody, texts: Sequence[str], images: Sequence[int], seen: list[Image.Image] | Clip
) -> Request:
    """The arguments of an answer about pictures or a clip, without a budget; `images` has how many
    pictures come with each text.

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
            talk[-1], seen if isinstance(seen, list) else [],
            video=seen if isinstance(seen, Clip) else None,
            system=system or None, history=tuple(history),
            max_tokens=DEFAULT_MAX_TOKENS if longest is None else longest,
            max_pixels=MOST_PIXELS, **options,
        )  # fmt: skip
    except UserError as problem:
        raise RequestRefusedError(in_api_words(str(problem))) from None
