"""RefCOCO, RefCOCO+ and RefCOCOg (arXiv:1608.00272, 1511.02283): the box that a phrase describes.

Reads the folder of the authors' REFER toolkit: a pickle, refs(unc).p, refs(umd).p or
refs(google).p, and instances.json. The images are COCO's, by `file_name` of instances.json. Every
phrase is a question. Without a split all but train are asked; the kind is the split. The pickle is
untrusted: plain_pickle.py reads plain data only, and no code in it can run.

The usual rule: right where the box overlaps the true one by an IoU of at least 0.5. A source's
`boxes` is the unit of the coordinates in question and response: "unit" (0 to 1 of width and
height, as LLaVA), "thousand" (0 to 1000, as Qwen-VL) or "pixels". The response's box is its first
four consecutive numbers, x1, y1, x2, y2. A box with swapped corners, or none, is wrong. Coordinates
refer to the whole image as it is stored: LLaVA pads images to squares, we do not.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import BadRecords, Question, Source
from .plain_pickle import read_plain_pickle
from .records import (
    RecordError,
    existing_file,
    existing_folder,
    id_field,
    image_file,
    load_json,
    questions_from,
    text_field,
)

Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
Size = tuple[int, int]  # width and height in pixels
PICKLES = ("refs(unc).p", "refs(umd).p", "refs(google).p")
UNITS = {
    "unit": "from 0 to 1, as parts of the image's width and height",
    "thousand": "from 0 to 1000, as thousandths of the image's width and height",
    "pixels": "in pixels",
}
PROMPT = "Please provide the bounding box coordinate of the region this sentence describes:"
LEAST_IOU = 0.5
_NUMBER = r"(-?\d+(?:\.\d+)?|-?\.\d+)"
_FOUR_NUMBERS = re.compile(r"[\s,;()\[\]<>]+".join([_NUMBER] * 4))


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a folder or of one pickle in it. Raises UserError for what is missing."""
    if source.boxes not in UNITS:
        raise UserError(f"boxes is {source.boxes!r}; it is {', '.join(UNITS)}")
    path = _pickle(source.path)
    if source.images is None:
        raise UserError("RefCOCO's images lie apart: name the folder of COCO's train2014")
    folder = existing_folder(source.images)
    records = load_json(path.parent / "instances.json", dict)
    images, boxes = _by_id(records, "images", path), _by_id(records, "annotations", path)
    refs = read_plain_pickle(path)
    if not isinstance(refs, list):
        raise UserError(f"{path} must hold a list")
    wanted = _wanted(refs, source.split, path)
    numbered = ((f"{path}, entry {n}", ref) for n, ref in enumerate(refs, 1) if wanted(ref))
    return questions_from(
        numbered, lambda ref: _questions(ref, images, boxes, folder, source.boxes), bad
    )


def _pickle(path: Path) -> Path:
    if not path.is_dir():
        return existing_file(path)
    pickles = [path / name for name in PICKLES if (path / name).is_file()]
    if not pickles:
        raise UserError(f"{path} holds none of {', '.join(PICKLES)}")
    return pickles[0]


def _by_id(records: dict[str, Any], key: str, path: Path) -> dict[Any, dict[str, Any]]:
    entries = records.get(key)
    if not isinstance(entries, list):
        raise UserError(f"{path.parent / 'instances.json'} has no list called {key}")
    objects = (entry for entry in entries if isinstance(entry, dict))
    return {entry["id"]: entry for entry in objects if isinstance(entry.get("id"), int)}


def _wanted(refs: list[Any], split: str | None, path: Path) -> Any:
    """A test for the references of a split. A reference without a split passes; it is reported
    as a bad record later."""
    if split is None:
        return lambda ref: not isinstance(ref, dict) or ref.get("split") != "train"
    named = (ref.get("split") for ref in refs if isinstance(ref, dict))
    splits = {name for name in named if isinstance(name, str)}
    if split not in splits:
        raise UserError(f"{path} has no split {split!r}; there are {', '.join(sorted(splits))}")
    return lambda ref: not isinstance(ref, dict) or ref.get("split") in (split, None)


def _questions(
    ref: Any, images: dict[Any, Any], boxes: dict[Any, Any], folder: Path, unit: str
) -> list[Question]:
    if not isinstance(ref, dict):
        raise RecordError("this is not a reference")
    kind, ref_id = text_field(ref, "split"), id_field(ref, "ref_id")
    image, box = images.get(_integer(ref, "image_id")), boxes.get(_integer(ref, "ann_id"))
    if image is None or box is None:
        raise RecordError("instances.json has not its image or its box")
    size = (_integer(image, "width"), _integer(image, "height"))
    if min(size) < 1:
        raise RecordError("its image has no size")
    corners = _corners(box.get("bbox"))
    file = image_file(folder, text_field(image, "file_name"))
    answer = _box_text(corners, size, unit)
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(s, dict) for s in sentences):
        raise RecordError("sentences is not a list of phrases")
    suffix = f"Answer with [x1, y1, x2, y2], {UNITS[unit]}."
    texts = [f"{PROMPT} {text_field(s, 'sent')}\n{suffix}" for s in sentences]
    return [
        Question(f"{ref_id}-{n}", text, (answer,), file, kind, scoring_data=(corners, size, unit))
        for n, text in enumerate(texts, 1)
    ]


def _integer(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RecordError(f"there is no {key}")
    return value


def _corners(bbox: Any) -> Box:
    """A box from COCO's x, y, width, height."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise RecordError("bbox is not four numbers")
    if not all(type(v) in (int, float) and abs(v) < 1e6 for v in bbox):
        raise RecordError("bbox is not four numbers")
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        raise RecordError("its box is empty")
    return x, y, x + width, y + height


def _box_text(corners: Box, size: Size, unit: str) -> str:
    scale = {"unit": 1, "thousand": 1000, "pixels": 0}[unit]
    parts = [v * scale / size[n % 2] if scale else v for n, v in enumerate(corners)]
    digits = 2 if unit == "unit" else 0
    return "[" + ", ".join(f"{part:.{digits}f}" for part in parts) + "]"


def parse_box(response: str, size: Size, unit: str) -> Box | None:
    """The first box that a response names, or None."""
    match = _FOUR_NUMBERS.search(response)
    if not match:
        return None
    scale = {"unit": 1.0, "thousand": 1000.0, "pixels": 0.0}[unit]
    x1, y1, x2, y2 = (
        float(v) * size[n % 2] / scale if scale else float(v) for n, v in enumerate(match.groups())
    )
    return x1, y1, x2, y2


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where either is empty or has swapped corners."""
    areas = [(x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else 0.0 for x1, y1, x2, y2 in (a, b)]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if min(areas) <= 0 or width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    return overlap / (sum(areas) - overlap)


def score(question: Question, response: str) -> float:
    """1 where the box overlaps the true one by an IoU of at least LEAST_IOU, else 0."""
    true_box, size, unit = question.scoring_data
    box = parse_box(response, size, unit)
    return float(box is not None and iou(box, true_box) >= LEAST_IOU)
