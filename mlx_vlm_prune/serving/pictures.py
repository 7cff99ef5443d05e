"""A request's pictures: decoded from `data:` URIs, or downloaded where the server allows URLs."""

import time
from collections.abc import Sequence

from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.image import MAX_PIXELS, open_image
from ..inputs.image_sources import DATA_URI, NamedBytes, is_url
from ..inputs.image_urls import SECONDS, download
from ..inputs.placement import stored_image
from .refusals import Notes, RequestRefusedError, in_api_words
from .request_schema import ImageUrl, VideoUrl
from .settings import MAX_BODY_BYTES, MAX_SIDE_RATIO, ServerSettings

VIDEO_URI = "data:video/"
Downloads = dict[str, NamedBytes]


def download_all(links: Sequence[ImageUrl | VideoUrl], seconds: float) -> Downloads:
    """The files behind all URLs of a request, one after another, within so many seconds and of
    MAX_BODY_BYTES together. Raises RequestRefusedError."""
    end, files, nbytes = time.monotonic() + seconds, Downloads(), 0
    for number, link in enumerate(links, 1):
        if not is_url(link.url) or link.url in files:
            continue
        try:
            left = max(0.0, end - time.monotonic())
            files[link.url] = download(link.url, seconds=min(SECONDS, left))
        except UserError as problem:
            if isinstance(link, VideoUrl):
                raise RequestRefusedError(f"the video: {problem}", field="video_url") from None
            raise _refusal(number, problem) from None
        nbytes += len(files[link.url])
        if nbytes > MAX_BODY_BYTES:
            most = MAX_BODY_BYTES // 1_000_000
            raise RequestRefusedError(f"the URLs have more than {most} MB together", 413)
    return files


def open_picture(
    number: int, link: ImageUrl, downloads: Downloads, settings: ServerSettings
) -> Image.Image:
    """A picture of a request, decoded. Raises RequestRefusedError, which says which one it is.

    No path is ever opened.
    """
    try:
        if link.url[: len(VIDEO_URI)].lower() == VIDEO_URI:
            raise UserError("it is a video; send it as video_url")
        source = source_of(link.url, downloads)
        picture = open_image(source, max(MAX_PIXELS, settings.max_pixels))
        check_shape(picture)
    except UserError as problem:
        raise _refusal(number, problem) from None
    return picture


def source_of(url: str, downloads: Downloads) -> str | bytes:
    """What is behind a URL: a `data:` URI, or the bytes that were downloaded. Raises UserError."""
    if not url:
        raise UserError("its url is empty")
    if url[: len(DATA_URI)].lower() == DATA_URI:
        return DATA_URI + url[len(DATA_URI) :]
    if url in downloads:
        return downloads[url]
    if is_url(url):
        raise UserError("it is a URL, and this server fetches none; send a data: URI")
    raise UserError("it is no data: URI, and local files are never opened")


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
    if (size := fitting_size(picture.size, max_pixels)) != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    if picture.size != (width, height):
        notes.warn(
            f"picture {number} has {width} x {height} pixels and the server allows {max_pixels}; it"
            f" is read as {picture.width} x {picture.height}",
            "image_url",
        )
    return picture


def fitting_size(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Width and height of at most so many pixels, in the same ratio."""
    factor = (max_pixels / (size[0] * size[1])) ** 0.5
    if factor >= 1:
        return size
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def _refusal(number: int, problem: UserError) -> RequestRefusedError:
    return RequestRefusedError(in_api_words(f"picture {number}: {problem}"), field="image_url")
