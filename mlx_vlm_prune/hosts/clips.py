"""A question about a clip: mlx-vlm's own template and processor, and what a clip cannot have.

A clip is one set of T x H x W visual tokens with one budget. A token shows the same place in
neighbouring frames, two with Qwen: T counts these groups. In the grid they stand below one another.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
from PIL import Image

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.result import GenerationResult
from ..inputs.messages import Turn
from ..inputs.video import Clip
from ..pruners import Pipeline, Pruner, Stage
from .host import Host
from .prepared_inputs import PreparedInputs, ProcessorOptions
from .prompt_text import check_prompt, conversation_messages, processed, rendered
from .views import View

VIDEO = "video"  # what stands for its path
STRIP_WIDTH = 448  # pixels, of a clip's frames as a picture
ONE_PICTURE = "it works on the grid of one picture, and a clip has a grid for each of its frames"
IN_TOWER = "inside the tower it works on one picture at a time"
BETWEEN_FRAMES = (
    "between layers it works on visual tokens in one piece, and this model has a time before each"
    " frame of a clip"
)


def open_clip(request: Request, options: ProcessorOptions) -> Clip | None:
    """The clip of a request, if it has one. Raises UserError."""
    clip = request.open_video()
    return clip and clip.resized(options.resize)


def check_clip(host: Host, pipeline: Pipeline) -> None:
    """Raises UserError for a model that reads no clips, and for methods that cannot prune one."""
    check_reads_clips(host)
    if why := why_not_clip(host, pipeline):
        raise UserError(why)


def check_reads_clips(host: Host) -> None:
    """Raises UserError for a model that reads none."""
    if host.why_no_clips:
        raise UserError(f"a {host.kind} model answers about no video: {host.why_no_clips}")


def why_not_clip(host: Host, pipeline: Pipeline) -> str | None:
    """Why one of these methods cannot prune a clip, if so."""
    for step in [*pipeline.steps, *pipeline.enhancers]:
        if reason := _why_not(host, step):
            return f"{step.name} cannot prune a clip: {reason}"
    return None


def _why_not(host: Host, step: Pruner) -> str | None:
    if step.stage is Stage.ENCODER:
        return IN_TOWER
    if step.stage is Stage.DECODER and host.parts_frames:
        return BETWEEN_FRAMES
    return ONE_PICTURE if "grid" in step.needs and not step.method.reads_frames else None


def prepare_clip(
    host: Host, request: Request, clip: Clip, options: ProcessorOptions
) -> PreparedInputs:
    """A question about a clip as ids and pixels, behind earlier turns, the first of which has the
    clip. Raises UserError."""
    check_reads_clips(host)
    token = getattr(host.processor, "video_token", None)
    marks = [token] if isinstance(token, str) and token else []
    answered = [text for turn in request.history for text in (turn.question, turn.answer)]
    for text in (request.prompt, request.system or "", *answered):
        check_prompt(host, text, marks)
    template_options = dict(request.chat_template_config or {})
    # The template reads no more of the clip than that there is one.
    video = {"video": [VIDEO], "fps": clip.fps}
    questions = [*request.history, Turn(request.prompt, 0, "")]
    turns = conversation_messages(host, questions, request.system, template_options, video)
    text = rendered(host, turns, template_options, request.system)
    if [text.count(mark) for mark in marks] != [1]:
        raise UserError(f"the chat template of this {host.kind} model has no place for a video")
    return processed(host, text, "video", lambda: _processed(host, text, clip, options))


def _processed(host: Host, text: str, clip: Clip, options: ProcessorOptions) -> PreparedInputs:
    from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

    source = {
        "total_num_frames": clip.total, "fps": clip.fps, "frames_indices": clip.numbers,
    }  # fmt: skip
    arrays = prepare_inputs(
        host.processor, videos=[clip.frames], prompts=text, video_metadata=[source],
        add_special_tokens=should_add_special_tokens(host.kind, host.processor), **options.kwargs,
    )  # fmt: skip
    names = ("input_ids", "attention_mask", "pixel_values_videos")
    ids, mask, pixels = (arrays.pop(name, None) for name in names)
    ids = mx.array(ids).reshape(-1)
    mask = mx.ones((1, len(ids)), mx.int32) if mask is None else mask
    return PreparedInputs(np.array(ids).tolist(), mask, pixels, extra=arrays)


def film_strip(clip: Clip, views: Sequence[View]) -> Image.Image:
    """The first frame of each group below one another, as the grid has them."""
    groups = views[0].signals.frames
    width, height = clip.frames[0].size
    size = STRIP_WIDTH, max(1, round(height * STRIP_WIDTH / width))
    strip = Image.new("RGB", (size[0], size[1] * groups))
    for group, number in enumerate(first_frames(len(clip.frames), groups)):
        strip.paste(clip.frames[number].resize(size), (0, size[1] * group))
    return strip


def first_frames(frames: int, groups: int) -> list[int]:
    """The first frame of each group; the processor repeats the last one to fill the last group."""
    return [*range(0, frames, -(-frames // groups))]


def with_clip(
    host: Host, answer: GenerationResult, clip: Clip, views: Sequence[View]
) -> GenerationResult:
    """The result before its first token with what it says of a clip."""
    strip, signals = [film_strip(clip, views)], views[0].signals
    frames, (rows, columns) = signals.frames, signals.grid
    kept, n = answer.kept_indices[0], rows // frames * columns
    counts = None if kept is None else np.bincount(np.array(kept, int) // n, minlength=frames)
    video = {
        "seconds": clip.seconds,
        "grid": [frames, rows // frames, columns],
        "kept_by_group": None if counts is None else counts.tolist(),
    }
    return replace(
        answer, video=video, views=host.drawn_views(views, strip),
        layouts=host.layouts(views, [picture.size for picture in strip]),
    )  # fmt: skip
