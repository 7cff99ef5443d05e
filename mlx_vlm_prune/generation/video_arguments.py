"""The options of a video, which `generate` and `chat` have."""

import argparse
from collections.abc import Callable
from typing import Any

from ..inputs.video import DEFAULT_FPS, DEFAULT_MAX_FRAMES

NAMES = ("video", "fps", "max_frames")


def add_video(add: Callable[..., Any]) -> None:
    """Add them to a group."""
    add(
        "--video", metavar="FILE|FOLDER",
        help="a video, an animation or a folder of frames, for mlx-vlm's Qwen models (default:"
        " none)",
    )  # fmt: skip
    add(
        "--fps", type=float, default=DEFAULT_FPS, metavar="N",
        help="frames a second to take of a video; those that a folder has",
    )  # fmt: skip
    add(
        "--max-frames", type=int, default=DEFAULT_MAX_FRAMES, metavar="N",
        help="the most frames of a video",
    )  # fmt: skip


def video_options(args: argparse.Namespace) -> dict[str, Any]:
    """As `stream_generate` takes them; nothing of another command's line."""
    return {name: getattr(args, name) for name in NAMES if hasattr(args, name)}
