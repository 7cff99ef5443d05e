"""Promises about pictures of few bytes that would keep a decoder busy: refused before it begins."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.inputs.image_files import MARKER, check_file

from .test_image import encoded, noise

ROOT = Path(__file__).resolve().parents[1]
PICTURE = Image.fromarray(noise())


def with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes so many times more."""
    data = encoded(Image.fromarray(noise(64, 64)), "JPEG", progressive=True, quality=50)
    begin = data.rindex(b"\xff\xda")
    return data[:-2] + data[begin:-2] * count + data[-2:]


def runs(count: int, width: int = 64, packing: int = 1) -> bytes:
    """A BMP that is packed by runs, all of them empty."""
    body = b"\0\2\0\0" * count
    head = struct.pack("<L2l2H6L", 40, width, 64, 1, 8, packing, len(body), 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<3L", start + len(body), 0, start) + head + bytes(1024) + body


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(
        ">L", zlib.crc32(kind + content)
    )  # fmt: skip


def png_with(chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with chunks before or behind its pixels."""
    data = encoded(PICTURE)
    place = len(data) - 12 if behind else 33
    return data[:place] + chunks + data[place:]


def profile(kind: bytes) -> bytes:
    """A chunk of a kilobyte that says it is a megabyte."""
    return chunk(kind, b"a\0\0" + zlib.compress(bytes((1 << 20) - 8), 9))


def gif_with(blocks: bytes) -> bytes:
    data = encoded(PICTURE, "GIF")
    place = 13 + (3 << ((data[10] & 7) + 1))
    return data[:place] + blocks + data[place:]


def tiff(entries: list[tuple[int, int, int, int]], size: int = 1 << 20) -> bytes:
    """A directory of these (tag, kind, count, value), and zeros."""
    packed = b"".join(struct.pack("<2H2L", *entry) for entry in sorted(entries))
    data = b"II*\0" + struct.pack("<LH", 8, len(entries)) + packed + bytes(4)
    return data + bytes(max(0, size - len(data)))


PLAIN = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
         (273, 4, 1, 4096), (278, 4, 1, 64), (279, 4, 1, 4096)]  # fmt: skip


def subdirectory() -> bytes:
    """An EXIF directory in a TIFF whose entries share half a megabyte."""
    data = bytearray(tiff([*PLAIN, (34665, 4, 1, 8192)]))
    entries = b"".join(struct.pack("<2H2L", 1000 + i, 7, 1 << 19, 9000) for i in range(50))
    data[8192 : 8194 + len(entries)] = struct.pack("<H", 50) + entries
    return bytes(data)


BOMBS = {
    "scans": (lambda: with_scans(20_000), "has more than 100 scans$"),
    "segments": (lambda: PROGRESSIVE[:2] + b"\xff\xe0\0\2" * 20_000 + PROGRESSIVE[2:], "segments$"),
    "runs": (lambda: runs(1_000_000), "packed by runs"),
    "runs of 4 bits": (lambda: runs(1_000_000, packing=2), "packed by runs"),
    "wide runs": (lambda: runs(10, width=1 << 20), "packed by runs"),
    "texts": (lambda: png_with(chunk(b"tEXt", b"a\0b") * 200_000), "more than 1000 chunks"),
    "texts behind": (lambda: png_with(chunk(b"tEXt", b"a\0b") * 9000, True), "more than 1000"),
    "profiles": (lambda: png_with(profile(b"iCCP") * 5000), "more than 1000 chunks"),
    "packed texts": (lambda: png_with(profile(b"zTXt") * 5000), "more than 1000 chunks"),
    "crumbs": (lambda: png_with(chunk(b"IDAT", b"") * 200_000), "100000 chunks of pixels"),
    "comments": (lambda: gif_with(b"!\xfe\1a\0" * 200_000), "blocks before a picture"),
    "crumbs of a comment": (lambda: gif_with(b"!\xfe" + b"\1a" * 200_000 + b"\0"), "blocks before"),
    "nothing": (lambda: gif_with(b"x" * 1_000_000), "blocks before a picture"),
    "entries": (lambda: tiff([(i, 7, 1 << 19, 4096) for i in range(256, 1000)]), "claim more"),
    "many entries": (lambda: tiff([(i, 3, 1, 1) for i in range(256, 9000)]), "1000 entries"),
    "strips": (lambda: tiff([*PLAIN[:5], (273, 4, 200_000, 4096)], 1 << 21), "100000 strips"),
    "tiles": (lambda: tiff([*PLAIN, (322, 4, 1, 1 << 16), (323, 4, 1, 1 << 14)]), "tiles larger"),
    "BigTIFF": (lambda: b"II+\0" + tiff(PLAIN)[4:], "is a BigTIFF; save it as a TIFF or PNG"),
    "the other way round": (lambda: b"MM\0+" + tiff(PLAIN)[4:], "is a BigTIFF"),
    "EXIF of a TIFF": (subdirectory, "claim more bytes"),
}  # fmt: skip
PROGRESSIVE = encoded(PICTURE, "JPEG", progressive=True)


@pytest.mark.parametrize("kind", BOMBS)
def test_a_picture_that_takes_minutes_is_refused_before_it_is_decoded(kind, monkeypatch):
    make, sentence = BOMBS[kind]

    def no_decoding(*_: object) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr("PIL.Image.open", no_decoding)
    with pytest.raises(UserError, match=sentence) as caught:
        open_image(make())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 150


def test_a_jpeg_with_the_scans_and_segments_of_photographs_is_read_as_pillow_reads_it():
    """Up to thumbnails, depth maps and a second picture behind the first."""
    exif = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(PROGRESSIVE)) + b"Exif\0\0" + PROGRESSIVE
    deep = b"\xff\xe1\xff\xff" + b"\xff\xda" * 32_766 + b"\0"
    for data in (with_scans(60), encoded(PICTURE, "JPEG"), PROGRESSIVE):
        whole = data[:2] + exif + deep * 20 + data[2:] + with_scans(90)
        with Image.open(io.BytesIO(data)) as opened:
            np.testing.assert_array_equal(np.asarray(open_image(whole)), np.asarray(opened))


def test_what_tells_of_colours_stays_in_a_jpeg():
    cmyk = encoded(PICTURE.convert("CMYK"), "JPEG")  # inverted, as Adobe's marker says
    assert b"Adobe" in check_file(cmyk, "a", 1).data
    kept = check_file(encoded(PICTURE, "JPEG", comment=b"x", exif=Image.Exif()), "a", 1)
    markers = {marker[1][0] for marker in MARKER.finditer(kept.data)}
    assert not markers & {0xE1, 0xE2, 0xFE} and 0xE0 in markers


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_a_long_animation_is_opened_at_its_first_frame(kind):
    frames = [Image.new("RGB", (8, 8), (i % 256, i // 256, 0)) for i in range(1, 400)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.new("RGB", (8, 8), "red"), kind, save_all=True, append_images=frames,
                   **options)  # fmt: skip
    assert open_image(data).getpixel((4, 4)) == (255, 0, 0)


def test_a_small_bmp_that_is_packed_by_runs_is_read():
    data = runs(0)
    body = b"".join(bytes([64, row]) + b"\0\0" for row in range(64)) + b"\0\1"
    grey = np.asarray(open_image(data[:54] + bytes(b for i in range(256) for b in (i, i, i, 0))
                                 + body))  # fmt: skip
    assert grey[:, 0, 0].tolist() == [*range(63, -1, -1)]


LIMITED = """
import resource, sys
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.inputs.image import open_image
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    open_image(sys.argv[1])
except UserError as e:
    print(e, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, sep="|")
"""


def test_an_animation_of_268_megapixels_takes_no_memory(tmp_path):
    side = struct.pack("<L", 16383 - 1)[:3]
    still = encoded(Image.new("RGB", (8, 8)), "WEBP")[12:]
    frame = bytes(6) + struct.pack("<L", 7)[:3] * 2 + bytes(4) + still
    chunks = b"ANIM" + struct.pack("<L", 6) + bytes(6) + b"ANMF" + struct.pack("<L", len(frame))
    chunks += frame
    head = b"VP8X" + struct.pack("<2L", 10, 2) + side + side
    data = b"WEBP" + head + chunks
    (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<L", len(data)) + data)
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "a.webp")], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    sentence, kilobytes = ran.stdout.split("|")
    assert "megapixels allowed" in sentence and int(kilobytes) < 50_000
