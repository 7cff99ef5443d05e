"""A request's clip: decoded from a `data:` URI, or from what the server has downloaded."""

from PIL import Image

from ..checkpoints.errors import UserError
from ..inputs.image import MAX_PIXELS
from ..inputs.video import (
    DEFAULT_FPS,
    DEFAULT_MAX_FRAMES,
    Clip,
    check_frame_options,
    open_video,
)
from .open_requests import OpenRequest
from .pictures import Downloads, check_shape, fitting_size, source_of
from .refusals import Notes, RequestRefusedError, in_api_words
from .request_schema import VideoUrl
from .settings import ServerSettings

FEW_MISSING = 1  # many files count a frame that is not there


def open_clip(
    link: VideoUrl, downloads: Downloads, settings: ServerSettings, open_request: OpenRequest,
    notes: Notes,
) -> Clip:  # fmt: skip
    """The clip of a request, no frame with more pixels than the server allows. No path is opened.

    Raises RequestRefusedError.
    """
    body_bytes, decoded_sizes = open_request.nbytes, list[tuple[int, int]]()

    def fit(frame: Image.Image) -> Image.Image:
        check_shape(frame)
        size = fitting_size(frame.size, settings.max_pixels)
        decoded_sizes.append(frame.size)
        open_request.hold(open_request.nbytes + 3 * size[0] * size[1])  # as RGB
        return frame if size == frame.size else frame.resize(size, Image.Resampling.BICUBIC)

    fps = DEFAULT_FPS if link.fps is None else link.fps
    max_frames = DEFAULT_MAX_FRAMES if link.max_frames is None else link.max_frames
    try:
        check_frame_options(fps, max_frames)
        source, most = source_of(link.url, downloads), max(MAX_PIXELS, settings.max_pixels)
        clip = open_video(source, fps, max_frames, most, fit, open_request.check)
    except UserError as problem:
        sentence = in_api_words(f"the video: {problem}")
        raise RequestRefusedError(sentence, field="video_url") from None
    open_request.hold(open_request.nbytes - body_bytes)
    width, height = decoded_sizes[0]
    if clip.frames[0].size != (width, height):
        notes.warn(
            f"the video has {width} x {height} pixels and the server allows {settings.max_pixels};"
            " it is read as {} x {}".format(*clip.frames[0].size),
            "video_url",
        )
    if clip.missing > FEW_MISSING:
        count = len(clip.frames) + clip.missing
        notes.warn(f"the last {clip.missing} of {count} frames of the video cannot be read")
    return clip
