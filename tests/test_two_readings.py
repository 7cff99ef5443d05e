"""Promises about files that two readers would read differently, or that claim what they lack: each
is refused in a sentence, before torch or MLX sees it.

The expected reading is that of the libraries: zipfile and torch for a .pth, safetensors for the
other format.
"""

import pickle
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors, read_header
from mlx_vlm_prune.checkpoints.reading.pth import read_pth
from mlx_vlm_prune.checkpoints.reading.pth_archive import END, END64, HEADER, LOCATOR
from mlx_vlm_prune.checkpoints.reading.pth_pickle import check_pickle

ROOT = Path(__file__).resolve().parents[1]
STATE = {"a": torch.arange(6.0), "b": torch.ones(2, 2).half()}
PICKLE = pickle.dumps({}, 2)
CENTRAL = struct.Struct("<4s6H3L5H2L")


def local(name: str, data: bytes, method: int = 0, size: int | None = None) -> bytes:
    """A part behind its header."""
    size = len(data) if size is None else size
    fields = (b"PK\3\4", 20, 0, method, 0, 0, zlib.crc32(data), len(data), size, len(name), 0)
    return HEADER.pack(*fields) + name.encode() + data


def central(
    name: str, data: bytes, place: int, method: int = 0, size: int | None = None, extra: bytes = b""
) -> bytes:
    """The directory's entry of a part."""
    size = len(data) if size is None else size
    fields = (b"PK\1\2", 20, 20, 0, method, 0, 0, zlib.crc32(data), len(data), size, len(name))
    return CENTRAL.pack(*fields, len(extra), 0, 0, 0, 0, place) + name.encode() + extra


def end(count: int, length: int, place: int) -> bytes:
    return END.pack(b"PK\5\6", 0, 0, count, count, length, place, 0)


def end64(count: int, length: int, place: int) -> bytes:
    return END64.pack(b"PK\6\6", END64.size - 12, 45, 45, 0, 0, count, count, length, place)


def archive(*parts: tuple[str, bytes], directory: bytes | None = None) -> bytes:
    """A plain archive of these parts."""
    body, entries = b"", b""
    for name, data in parts:
        entries += central(name, data, len(body))
        body += local(name, data)
    entries = entries if directory is None else directory
    return body + entries + end(len(parts), len(entries), len(body))


def two_directories() -> bytes:
    """The file that was found: zipfile reads the record before the locator, torch that to which
    the locator points, and there a pickle of a gigabyte in a megabyte."""
    bomb = pickle.dumps({"x": "y" * (1 << 20)}, 2)
    packed = zlib.compressobj(9, zlib.DEFLATED, -15)
    small = packed.compress(bomb) + packed.flush()
    body = local("a/data.pkl", PICKLE)
    hidden = len(body)
    body += local("a/data.pkl", small, 8, len(bomb))
    theirs = central("a/data.pkl", small, hidden, 8, len(bomb))
    theirs += central("a/version", b"3", len(body))
    body += local("a/version", b"3")
    at = len(body)
    body += theirs
    record = len(body)
    body += end64(2, len(theirs), at)
    ours = central("a/data.pkl", PICKLE, 0)
    at = len(body)
    body += ours + end64(1, len(ours), at)
    locator = LOCATOR.pack(b"PK\6\7", 0, record, 1)
    return body + locator + end(1, len(ours), at)


def overlapping() -> bytes:
    """Two entries, one of which lies inside the other's bytes."""
    inner = local("a/version", b"3")
    outer = local("a/data.pkl", PICKLE + inner)
    place = len(outer) - len(inner)
    entries = central("a/data.pkl", PICKLE + inner, 0) + central("a/version", b"3", place)
    return outer + entries + end(2, len(entries), len(outer))


def other_header(**changes) -> bytes:
    """An archive whose part's own header differs from the directory."""
    good = local("a/data.pkl", PICKLE)
    begin = {"name": good.replace(b"data.pkl", b"code.pkl"), "method": good[:8] + b"\x08\0"
             + good[10:]}[changes.popitem()[0]]  # fmt: skip
    entries = central("a/data.pkl", PICKLE, 0)
    return begin + entries + end(1, len(entries), len(begin))


def twice_wide() -> bytes:
    """An entry with two zip64 fields."""
    field = struct.pack("<2HQ", 1, 8, len(PICKLE))
    entries = central("a/data.pkl", PICKLE, 0, extra=field + field)
    return archive(("a/data.pkl", PICKLE), directory=entries)


GOOD = archive(("a/data.pkl", PICKLE))
ARCHIVES = {
    "two directories": (two_directories, "locator does not point at the record before it"),
    "bytes before": (lambda: b"x" * 7 + GOOD, "does not lie before its end"),
    "bytes behind": (lambda: GOOD + b"x", "does not end with the file"),
    "comment": (lambda: GOOD[:-2] + b"\2\0ab", "does not end with the file"),
    "one name": (lambda: archive(("a/data.pkl", PICKLE), ("a/data.pkl", b"x")), "have one name"),
    "two cases": (lambda: archive(("a/data.pkl", PICKLE), ("a/DATA.pkl", b"x")), "have one name"),
    "folders": (lambda: archive(("a/data.pkl", PICKLE), ("b/data.pkl", b"x")), "more than one fol"),
    "overlap": (overlapping, "does not begin behind another"),
    "name": (lambda: other_header(name=1), "is not that of its directory"),
    "method": (lambda: other_header(method=1), "is not that of its directory"),
    "NUL": (lambda: archive(("a/data.pkl\0x", PICKLE)), "more than one name or size"),
    "zip64 twice": (twice_wide, "more than one name or size"),
    "count": (lambda: GOOD[:-14] + b"\2\0\2\0" + GOOD[-10:], "counts 2 parts"),
    "no pickle": (lambda: archive(("a/version", b"3")), "holds no data.pkl"),
    "long pickle": (lambda: archive(("a/data.pkl", b"." * (1 << 23))), "at most 4194304 are read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("suffix", ["pth", "bin"])
def test_an_archive_with_two_readings_is_refused(kind, suffix, tmp_path):
    make, sentence = ARCHIVES[kind]
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(make())
    with pytest.raises(UserError, match=sentence) as caught:
        read_pth(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_zipfile_and_torch_do_read_the_two_directories_differently(tmp_path):
    """What is refused is no matter of taste."""
    file = tmp_path / "a.pth"
    file.write_bytes(two_directories())
    theirs = torch.load(file, weights_only=True)
    with zipfile.ZipFile(file) as opened:
        assert opened.read("a/data.pkl") == PICKLE
    assert len(theirs["x"]) == 1 << 20


@pytest.mark.parametrize("content", [STATE, {"model": STATE, "step": 3, "lr": 0.5, "name": "x"},
    {k: torch.nn.Parameter(v) for k, v in STATE.items()}, torch.nn.Linear(3, 2).state_dict(),
    {"a": torch.arange(4, dtype=torch.float64).bfloat16()}],
    ids=["plain", "training", "parameters", "module", "bfloat16"])  # fmt: skip
def test_what_torch_saves_is_read_as_torch_reads_it(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    tensors = read_pth(tmp_path / "a.pth")
    expected = content.get("model", content)
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert bytes(tensors[name].data) == bytes(value.detach().view(torch.uint8).numpy())


def test_an_archive_that_python_wrote_is_read(tmp_path):
    torch.save(STATE, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as before:
        parts = {name: before.read(name) for name in before.namelist()}
    with zipfile.ZipFile(tmp_path / "b.pth", "w") as after:
        for name, data in parts.items():
            after.writestr(name, data)
    assert read_pth(tmp_path / "b.pth") == read_pth(tmp_path / "a.pth")


def nested_tuples() -> bytes:
    """A key whose hash takes two to the fortieth steps."""
    return b"\x80\x02}(K\x01" + b"q\x00h\x00\x86" * 40 + b"K\x01u."


COPIES = b"\x80\x02](" + b"K\x01" * 1000 + b"eq\x00"  # a list of 1,000, then copies of it
PICKLES = {
    "bytearray": (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R.", "bytearray"),
    "set": (b"\x80\x02cbuiltins\nset\n]\x85R.", "it names builtins.set"),
    "encode": (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0xX\x03\0\0\0hex\x86R.", "_codecs.encode"),
    "tensor": (b"\x80\x02ctorch\nFloatTensor\nJ\0\0\0\x7f\x85R.", "torch.FloatTensor"),
    "copies": (COPIES + b"ccollections\nOrderedDict\nh\0\x85R.", "copies a list of 1000 values"),
    "attributes": (b"\x80\x02ccollections\nOrderedDict\n)R}(" + b"".join(
        b"K" + bytes([n]) + b"K\1" for n in range(100)) + b"ub.", "copies a _Named of 100 values"),
    "tuples": (nested_tuples(), "a key of it is a tuple"),
    "frame": (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", ""),
    "buffer": (b"\x80\x05\x96\xff\xff\xff\xff\x02\0\0\0.", ""),
    "cut off": (b"\x80\x02}(", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_that_makes_more_than_tensors_is_refused_unexecuted(kind, tmp_path):
    data, why = PICKLES[kind]
    (tmp_path / "a.pth").write_bytes(archive(("a/data.pkl", data), ("a/version", b"3")))
    with pytest.raises(UserError, match="nothing in it was executed") as caught:
        read_pth(tmp_path / "a.pth")
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_many_tensors_are_gone_through_in_little_time(tmp_path):
    torch.save({f"layer.{i}.weight": torch.zeros(1) for i in range(5000)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as opened:
        check_pickle(opened.read("a/data.pkl"))


def header(text: str, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text.encode() + body


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
HEADERS = {
    "tensor": (header(f'{{"a":{ENTRY % (0, 4)},"a":{ENTRY % (0, 4)}}}', bytes(4)), "'a' twice"),
    "metadata": (header('{"__metadata__":{"format":"pt","format":"mlx"}}'), "'format' twice"),
    "long": (header("{" + " " * (1 << 24) + "}"), "16777218 bytes; at most 16777216 are read"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_with_two_readings_or_too_long_is_refused(kind, tmp_path):
    data, sentence = HEADERS[kind]
    (tmp_path / "a.safetensors").write_bytes(data)
    for read in (read_header, open_safetensors):
        with pytest.raises(UserError, match=sentence):
            read(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{}", '{"__metadata__":null}', '{"__metadata__":{}}  '])
def test_a_header_without_tensors_is_read(text, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(header(text))
    assert read_header(tmp_path / "a.safetensors") == ({}, None)
    assert open_safetensors(tmp_path / "a.safetensors") == {}


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.pth import read_pth
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_pth(Path(sys.argv[1]))
except UserError as e:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_bomb_takes_no_memory(tmp_path):
    (tmp_path / "a.pth").write_bytes(two_directories())
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "a.pth")], cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert int(ran.stdout) < 50_000  # of 1024 bytes; 2**20 letters alone are not made
