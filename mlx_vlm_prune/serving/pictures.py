"""A request's pictures: decoded from `data:` URIs, or downloaded where the server allows URLs."""

import time
from collections.abc import Sequence

from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.image import MAX_PIXELS, open_image
from ..inputs.image_sources import DATA_URI, DownloadedImage, is_url
from ..inputs.image_urls import SECONDS, download
from ..inputs.placement import stored_image
from .refusals import Notes, RequestRefusedError, in_api_words
from .request_schema import ImageUrl
from .settings import MAX_BODY_BYTES, MAX_SIDE_RATIO, ServerSettings

Downloads = dict[str, DownloadedImage]


def download_pictures(links: Sequence[ImageUrl], seconds: float) -> Downloads:
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
            raise _refusal(number, problem) from None
        nbytes += len(files[link.url])
        if nbytes > MAX_BODY_BYTES:
            most = MAX_BODY_BYTES // 1_000_000
            raise RequestRefusedError(f"the pictures have more than {most} MB together", 413)
    return files


def open_picture(
    number: int, link: ImageUrl, downloads: Downloads, settings: ServerSettings
) -> Image.Image:
    """A picture of a request, decoded. Raises RequestRefusedError, which says which one it is.

    No path is ever opened.
    """
    is_data = link.url[: len(DATA_URI)].lower() == DATA_URI
    try:
        if is_data:
            source: str | bytes = DATA_URI + link.url[len(DATA_URI) :]
        elif link.url in downloads:
            source = downloads[link.url]
        elif is_url(link.url):
            raise UserError("it is a URL, and this server fetches none; send a data: URI")
        else:
            raise UserError("it is no data: URI, and local files are never opened")
        picture = open_image(source, max(MAX_PIXELS, settings.max_pixels))
        check_shape(picture)
    except UserError as problem:
        raise _refusal(number, problem) from None
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


def _refusal(number: int, problem: UserError) -> RequestRefusedError:
    return RequestRefusedError(in_api_words(f"picture {number}: {problem}"), field="image_url")
