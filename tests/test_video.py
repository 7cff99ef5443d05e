"""A clip is read frame by frame, at its source's times, and a bad one is refused in a sentence."""

import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.video import frame_numbers, open_video

cv2 = pytest.importorskip("cv2", reason="OpenCV, which mlx-vlm brings, is not installed")
SIZE = (64, 48)


def frame(number: int) -> Image.Image:
    """Drawn here: a square that moves four pixels to the right, on a colour of its own."""
    picture = Image.new("RGB", SIZE, (10 * number, 90, 160))
    picture.paste((250, 200, 20), (4 * number, 10, 4 * number + 12, 22))
    return picture


def folder_of(home: Path, frames: int) -> Path:
    home.mkdir(exist_ok=True)
    for number in range(frames):
        frame(number).save(home / f"{number:02}.png")
    return home


def animation(file: Path, frames: int, ms: int) -> Path:
    first, *others = map(frame, range(frames))
    options = {"lossless": True} if file.suffix == ".webp" else {}
    first.save(file, save_all=True, append_images=others, duration=ms, **options)
    return file


def film(file: Path, frames: int, fps: float, codec: str = "MJPG") -> Path:
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*codec), fps, SIZE)
    for number in range(frames):
        writer.write(np.asarray(frame(number))[..., ::-1])
    writer.release()
    return file


def numbers_seen(clip) -> list[int]:
    """Which frames these are, by their colour."""
    return [round(np.asarray(f)[-1, -1, 0] / 10) for f in clip.frames]


def test_how_many_frames_are_taken_worked_by_hand():
    # 90 frames in 3 seconds: 6 of 2 a second, from the first to the last 17.8 apart.
    assert frame_numbers(90, 30, 2, 32) == [0, 18, 36, 53, 71, 89]
    assert frame_numbers(90, 30, 2, 5) == [0, 30, 59, 89]  # an even number, since two go together
    assert frame_numbers(30, 30, 1, 32) == [0, 10, 19, 29]  # four at least
    assert frame_numbers(3, 30, 2, 32) == [0, 2]
    assert frame_numbers(1, 30, 2, 32) == frame_numbers(90, 30, 2, 1) == [0]


def test_the_pictures_of_a_folder_are_frames_in_the_order_of_their_names(tmp_path):
    home = folder_of(tmp_path / "clip", 7)
    (home / "notes.txt").write_text("no picture")
    clip = open_video(home, fps=4)
    assert numbers_seen(clip) == [0, 1, 2, 3, 4, 5, 6] == clip.numbers
    assert clip.seconds == [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]
    clip = open_video(home, fps=4, max_frames=3)
    assert numbers_seen(clip) == [0, 3, 6] and clip.seconds == [0, 0.75, 1.5]
    assert numbers_seen(open_video([home / "02.png", frame(5)])) == [2, 5]


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_is_a_clip(tmp_path, name):
    clip = open_video(animation(tmp_path / name, 10, 100), fps=4)
    assert (clip.total, clip.fps) == (10, 10)
    assert numbers_seen(clip) == clip.numbers == [0, 3, 6, 9]
    assert clip.frames[0].mode == "RGB" and clip.frames[0].size == SIZE


@pytest.mark.parametrize("name, codec", [("a.avi", "MJPG"), ("a.mp4", "mp4v")])
def test_of_a_video_file_the_frames_are_those_that_mlx_vlm_takes(tmp_path, name, codec):
    from mlx_vlm.utils import load_video

    file = film(tmp_path / name, 20, 10, codec)
    for fps, most in ((2, 32), (5, 8)):
        clip = open_video(file, fps, most)
        theirs, source = load_video(str(file), fps=fps, max_frames=most)
        assert clip.numbers == source.frames_indices and clip.seconds == source.timestamps
        np.testing.assert_array_equal(np.stack(clip.frames), theirs.transpose(0, 2, 3, 1))


def test_frames_are_made_to_fit(tmp_path):
    clip = open_video(folder_of(tmp_path / "clip", 2))
    assert {f.size for f in clip.resized((32, 32)).frames} == {(32, 24)}
    assert clip.resized(None) is clip


def test_what_is_no_clip_is_refused_in_a_sentence(tmp_path):
    empty, mixed = tmp_path / "empty", folder_of(tmp_path / "mixed", 2)
    empty.mkdir()
    Image.new("RGB", (8, 8)).save(mixed / "99.png")
    (tmp_path / "a.txt").write_text("some words, and no video")
    frame(1).save(tmp_path / "still.gif")
    whole = film(tmp_path / "a.avi", 20, 10).read_bytes()
    (tmp_path / "head.avi").write_bytes(whole[:40])
    webp = animation(tmp_path / "a.webp", 10, 100).read_bytes()
    (tmp_path / "cut.webp").write_bytes(webp[: len(webp) // 2])
    for name, sentence in {
        "none.mp4": "none.mp4 cannot be read: No such file or directory",
        "empty": "empty has no pictures",
        "mixed": "must have one size; 64 x 48 and 8 x 8",
        "a.txt": "a.txt is not an MP4, MOV, MKV, WebM or AVI file, an animated GIF, WebP or PNG,",
        "still.gif": "still.gif has 1 frame; a clip has 2 to 100000",
        "head.avi": "head.avi is damaged, or a video that OpenCV cannot read",
        "cut.webp": "cut.webp is truncated or damaged",
    }.items():
        with pytest.raises(UserError, match=sentence):
            open_video(tmp_path / name)


def test_a_gif_whose_frames_outgrow_it_or_that_hides_blocks_is_refused(tmp_path):
    whole = animation(tmp_path / "a.gif", 3, 100).read_bytes()
    second = whole.index(b"\x2c", whole.index(b"\x21\xf9", whole.index(b"\x2c")))
    larger = whole[: second + 5] + (500).to_bytes(2, "little") * 2 + whole[second + 9 :]
    with pytest.raises(UserError, match="must have one size; 64 x 48 and 500 x 500"):
        open_video(larger)
    small = whole[: second + 11] + b"\1a" * 20_000 + b"\0" + whole[-1:]
    with pytest.raises(UserError, match="shorter than encoders write them"):
        open_video(small)
    comments = whole[:second] + b"\x21\xfe\x01a\x00" * 20_000 + whole[second:]
    with pytest.raises(UserError, match="has more than 10000 blocks before a picture"):
        open_video(comments)


class EndedError(Exception):
    """Nobody waits any more."""


@pytest.mark.parametrize("name, calls", [("clip", 3), ("a.gif", 10 + 10), ("a.avi", 4)])
def test_decoding_can_be_ended_before_each_frame(tmp_path, name, calls):
    folder_of(tmp_path / "clip", 3)
    animation(tmp_path / "a.gif", 10, 100)
    film(tmp_path / "a.avi", 20, 10)

    def checks_until(most: int) -> int:
        checks = []

        def check() -> None:
            checks.append(1)
            if len(checks) > most:
                raise EndedError

        with suppress(EndedError):
            open_video(tmp_path / name, check=check)
            return len(checks)
        return -1

    assert checks_until(calls) == calls
    assert [checks_until(most) for most in range(calls)] == [-1] * calls


def test_a_list_of_streams_is_no_avi_file(tmp_path):
    (tmp_path / "list.avi").write_bytes(b"#EXTM3U\nAVI ")
    with pytest.raises(UserError, match="is not an MP4, MOV, MKV, WebM or AVI file"):
        open_video(tmp_path / "list.avi")


def test_bytes_need_a_temporary_folder(tmp_path, monkeypatch):
    content = film(tmp_path / "a.avi", 20, 10).read_bytes()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match="the video needs a temporary file, which fails: No such"):
        open_video(content)


@pytest.mark.parametrize("name", ["mixed", "a.gif", "a.avi"])
def test_frames_that_memory_would_not_hold_are_refused(tmp_path, name):
    folder_of(tmp_path / "mixed", 3)
    animation(tmp_path / "a.gif", 10, 100)
    film(tmp_path / "a.avi", 20, 10)
    with pytest.raises(UserError, match="more than the"):
        open_video(tmp_path / name, max_pixels=1000)
    with pytest.raises(UserError, match="max_frames"):
        open_video([frame(1)] * 17, max_pixels=SIZE[0] * SIZE[1])
