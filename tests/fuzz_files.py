"""Fuzzes what strangers' files are read by: `python -m tests.fuzz_files FOLDER CASES`.

Of each kind so many seeded cases; each must end in an answer or in one sentence. Prints a line of
JSON: of each kind how many were answered and refused, and what ended otherwise.
"""

import io
import json
import random
import resource
import struct
import sys
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import deserialize
from safetensors.numpy import save

from mlx_vlm_prune.checkpoints.adapters import AdapterConfig
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.reading.files import open_safetensors, read_header
from mlx_vlm_prune.checkpoints.reading.pth import read_pth
from mlx_vlm_prune.checkpoints.reading.weights import check_learned
from mlx_vlm_prune.inputs.image import open_image
from mlx_vlm_prune.models.learned import read_learned
from mlx_vlm_prune.pruners import METHODS

SPARE_MEMORY = 1 << 30  # bytes of addresses beyond what is loaded
SECONDS = 5  # of one case, of this process' time
NUMBERS = (0, 1, 2, 7, 255, 256, 32_767, 65_535, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDTH = 8  # of the features that learned weights are for

Case = Callable[[random.Random, Path], None]


def mutate(data: bytes, draw: random.Random) -> bytes:
    """One to four bytes, numbers or pieces changed, doubled, moved or left out."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        if not changed:
            break
        kind, at = draw.randrange(7), draw.randrange(len(changed))
        other, length = draw.randrange(len(changed)), draw.choice((1, 4, 12, 60))
        if kind == 0:
            changed[at] = draw.randrange(256)
        elif kind == 1:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:  # a number of four or two bytes
            order, value = draw.choice("<>"), draw.choice(NUMBERS)
            packed = struct.pack(f"{order}L", value)
            packed = packed if draw.random() < 0.5 else struct.pack(f"{order}H", value & 0xFFFF)
            changed[at : at + len(packed)] = packed
        elif kind == 3:
            changed[at:at] = changed[other : other + length]
        elif kind == 4:
            del changed[at : at + length]
        elif kind == 5:
            changed[at : at + length] = changed[other : other + length]
        else:
            changed[at:at] = changed[other : other + length] * draw.choice((10, 300))
    return bytes(changed[: draw.choice((len(changed),) * 3 + (at,))])


def _pictures() -> list[bytes]:
    """A small file of each format."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture, files = Image.fromarray(noise), []
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind, options in (
        ("PNG", {"exif": exif}), ("JPEG", {"exif": exif}), ("JPEG", {"progressive": True}),
        ("GIF", {}), ("BMP", {}), ("WEBP", {"exif": exif}), ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"tiffinfo": {0x0112: 5}}),
        ("GIF", {"save_all": True, "append_images": [picture.rotate(90)] * 3}),
    ):  # fmt: skip
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files.append(buffer.getvalue())
    return files


PICTURES = _pictures()


def _sealed(data: bytes) -> bytes:
    """A PNG whose checks are right again, so that its chunks are read."""
    at, chunks = 8, [data[:8]]
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">L", data, at)
        part = data[at + 4 : at + 8 + length]
        chunks.append(data[at : at + 4] + part + struct.pack(">L", zlib.crc32(part)))
        at += 12 + length
    return b"".join(chunks)


def picture(draw: random.Random, folder: Path) -> None:
    data = mutate(draw.choice(PICTURES), draw)
    opened = open_image(_sealed(data) if data.startswith(b"\x89PNG\r\n\x1a\n") else data)
    assert opened.mode == "RGB" and opened.width * opened.height <= 25_000_000


def archive(draw: random.Random, folder: Path) -> None:
    """A .pth; where it is read, torch's own checks of its sums did not fail either."""
    good = folder / "good.pth"
    if not good.exists():
        torch.save({"a": torch.arange(6.0), "b": torch.ones(2, 2).half()}, good)
    data, file = good.read_bytes(), folder / "m.pth"
    size = len(data)
    places = [draw.randrange(size), draw.randrange(max(0, size - 400), size)]  # its directory
    at = draw.choice(places)
    file.write_bytes(data[:at] + mutate(data[at : at + 200], draw) + data[at + 200 :])
    tensors = read_pth(file)
    assert sum(tensor.data.nbytes for tensor in tensors.values()) <= 2 * file.stat().st_size


JSON_VALUES = (
    0,
    -1,
    1.5,
    1 << 40,
    "F32",
    "F64",
    "I8",
    None,
    [],
    [1 << 33],
    [-1],
    {},
    True,
    "\ud800",
)


def header(draw: random.Random, folder: Path) -> None:
    """A safetensors file whose header is JSON with other values; read as its own library reads."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in "abc":
        entries[name] = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        begin = 8 * "abc".index(name)
        entries[name]["data_offsets"] = [begin, begin + 8]
    for _ in range(draw.randint(0, 2)):
        part = entries[draw.choice([*entries])]
        part[draw.choice([*part, "x"])] = draw.choice(JSON_VALUES)
    text = json.dumps(entries)
    for _ in range(draw.randint(0, 2)):
        first, second = draw.choice(text), draw.choice(text)
        text = text.replace(first, second, draw.choice((0, 1)))
    body = text.encode("utf-8", "surrogatepass")
    data = struct.pack("<Q", len(body) + draw.choice((0,) * 6 + (1, -1))) + body + bytes(24)
    file = folder / "m.safetensors"
    file.write_bytes(data)
    read_header(file)
    theirs = {name: (t["shape"], bytes(t["data"])) for name, t in deserialize(data)}
    ours = open_safetensors(file)
    assert {n: ([*t.shape], bytes(t.data)) for n, t in ours.items()} == theirs


def _tensor(draw: random.Random, array: np.ndarray) -> np.ndarray:
    """The same with another kind, shape or value."""
    change = draw.randrange(6)
    if change == 0:
        return array.astype(draw.choice([np.float64, np.int8, np.uint8, np.bool_, np.float16]))
    if change == 1:
        return array * draw.choice([np.float32(np.nan), np.float32(np.inf)])
    if change == 2:
        return array.reshape(-1)[: draw.choice((0, 1, array.size))]
    if change == 3:
        return array[None]
    if change == 4:
        return np.concatenate([array, array])
    return array


def _damaged(draw: random.Random, tensors: dict[str, np.ndarray]) -> bytes:
    state = dict(tensors)
    for _ in range(draw.randint(0, 2)):
        name = draw.choice([*state])
        value = state.pop(name)
        if draw.random() < 0.8:
            name = draw.choice([name, name, name, f"{name}.x", name.upper(), f"twig.{name}", "x"])
            state[name] = _tensor(draw, value)
        if not state:
            break
    data = save(state)
    return mutate(data, draw) if draw.random() < 0.2 else data


def _learned() -> dict[str, np.ndarray]:
    from mlx.utils import tree_flatten

    arrays = {}
    for name, method in METHODS.items():
        if method.learned and name != "twig":
            parameters: Any = tree_flatten(method.make_weights(WIDTH, 3).parameters())
            arrays |= {f"{name}.{key}": np.array(value) for key, value in parameters}
    return arrays


LEARNED = _learned()


def learned(draw: random.Random, folder: Path) -> None:
    """pruners.safetensors, of one method or of all."""
    name = draw.choice([*LEARNED]).partition(".")[0]
    of_one = {key: value for key, value in LEARNED.items() if key.startswith(f"{name}.")}
    state = draw.choice([of_one, LEARNED])
    (folder / "pruners.safetensors").write_bytes(_damaged(draw, state))
    model: Any = SimpleNamespace(feature_dims=WIDTH)
    read_learned(folder, model)


SETTINGS = {
    "fine_tune_type": "lora", "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
}  # fmt: skip
SETTING_VALUES = (*JSON_VALUES, float("nan"), 1e308, "lora", "1e400", ["x", 3], {"rank": "4"})


def adapter(draw: random.Random, folder: Path) -> None:
    """adapter_config.json and adapters.safetensors."""
    settings = json.loads(json.dumps(SETTINGS))
    for _ in range(draw.randint(0, 2)):
        part = draw.choice([settings, settings.get("lora_parameters")])
        if isinstance(part, dict):
            part[draw.choice([*part, "x"])] = draw.choice(SETTING_VALUES)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    arrays = {f"layers.{i}.lora_{x}": np.ones((4, 4), np.float32) for i in (0, 1) for x in "ab"}
    (folder / "adapters.safetensors").write_bytes(_damaged(draw, arrays))
    AdapterConfig.read(folder)
    check_learned(folder / "adapters.safetensors")


KINDS: dict[str, Case] = {
    "picture": picture, "archive": archive, "header": header, "learned": learned,
    "adapter": adapter,
}  # fmt: skip


def run(kind: str, cases: int, folder: Path) -> dict[str, Any]:
    """So many cases of a kind."""
    answered, refused, faults = 0, 0, list[str]()
    for seed in range(cases):
        start = time.process_time()
        try:
            KINDS[kind](random.Random(f"{kind} {seed}"), folder)
            answered += 1
        except UserError as e:
            refused += 1
            if "\n" in str(e) or len(str(e)) > 600:
                faults.append(f"{kind} {seed}: no short sentence: {str(e)[:200]!r}")
        except Exception:
            faults.append(f"{kind} {seed}: {traceback.format_exc(limit=-3)}")
        if (seconds := time.process_time() - start) > SECONDS:
            faults.append(f"{kind} {seed}: took {seconds:.1f} s")
    return {"answered": answered, "refused": refused, "faults": faults[:5]}


def main() -> None:
    """All kinds, in bounded memory."""
    folder, cases = Path(sys.argv[1]), int(sys.argv[2])
    np.seterr(invalid="ignore")
    for kind in KINDS:  # whatever is imported late
        run(kind, 5, folder)
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + SPARE_MEMORY,) * 2)
    print(json.dumps({kind: run(kind, cases, folder) for kind in KINDS}))


if __name__ == "__main__":
    main()
