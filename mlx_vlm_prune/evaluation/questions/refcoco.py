"""RefCOCO, RefCOCO+ and RefCOCOg (arXiv:1608.00272, 1511.02283): where is what a phrase means?

Read is the folder of the authors' REFER toolkit: a pickle, refs(unc).p, refs(umd).p or
refs(google).p, and instances.json; the images are COCO's, by `file_name` of instances.json. Every
phrase is a question. Without a split all but train are asked; the kind is the split. The
pickle is a stranger's: pickles.py reads plain data only, and no code in it can run.

The field's rule: right where the box overlaps the true one by an IoU of at least 0.5. A source's
`boxes` says in which coordinates the answer is asked for and read: "unit" (0 to 1 of width and
height, as LLaVA does), "thousand" (0 to 1000, as Qwen-VL does) or "pixels". The box is the first
four numbers in a row, x1, y1, x2, y2; one whose corners are swapped, or none, is wrong. All
refers to the whole image as it is stored: LLaVA pads images to squares, we do not.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoints.errors import UserError
from . import Bad, Question, Source
from .pickles import plain_data
from .reading import Fault, each, existing, folder, image_file, name_of, text_of, whole_json

Box = tuple[float, float, float, float]
PICKLES = ("refs(unc).p", "refs(umd).p", "refs(google).p")
ASKED = {
    "unit": "from 0 to 1, as parts of the image's width and height",
    "thousand": "from 0 to 1000, as thousandths of the image's width and height",
    "pixels": "in pixels",
}
PROMPT = "Please provide the bounding box coordinate of the region this sentence describes:"
LEAST = 0.5
_NUMBER = r"(-?\d+(?:\.\d+)?|-?\.\d+)"
_FOUR = re.compile(r"[\s,;()\[\]<>]+".join([_NUMBER] * 4))


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a folder or of one pickle in it. Raises UserError for what is missing."""
    if source.boxes not in ASKED:
        raise UserError(f"boxes is {source.boxes!r}; it is {', '.join(ASKED)}")
    path = _pickle(source.path)
    if source.images is None:
        raise UserError("RefCOCO's images lie apart: name the folder of COCO's train2014")
    home = folder(source.images)
    records = whole_json(path.parent / "instances.json", dict)
    images, boxes = _by_id(records, "images", path), _by_id(records, "annotations", path)
    refs = plain_data(path)
    if not isinstance(refs, list):
        raise UserError(f"{path} must hold a list")
    wanted = _wanted(refs, source.split, path)
    numbered = ((f"{path}, entry {n}", ref) for n, ref in enumerate(refs, 1) if wanted(ref))
    return each(numbered, lambda ref: _questions(ref, images, boxes, home, source.boxes), bad)


def _pickle(path: Path) -> Path:
    if not path.is_dir():
        return existing(path)
    found = [path / name for name in PICKLES if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} holds none of {', '.join(PICKLES)}")
    return found[0]


def _by_id(records: dict[str, Any], key: str, path: Path) -> dict[Any, dict[str, Any]]:
    listed = records.get(key)
    if not isinstance(listed, list):
        raise UserError(f"{path.parent / 'instances.json'} has no list called {key}")
    entries = (entry for entry in listed if isinstance(entry, dict))
    return {entry["id"]: entry for entry in entries if isinstance(entry.get("id"), int)}


def _wanted(refs: list[Any], split: str | None, path: Path) -> Any:
    """Whether a reference is asked about; what has no split is, and is found at fault then."""
    if split is None:
        return lambda ref: not isinstance(ref, dict) or ref.get("split") != "train"
    named = (ref.get("split") for ref in refs if isinstance(ref, dict))
    there = {name for name in named if isinstance(name, str)}
    if split not in there:
        raise UserError(f"{path} has no split {split!r}; there are {', '.join(sorted(there))}")
    return lambda ref: not isinstance(ref, dict) or ref.get("split") in (split, None)


def _questions(
    ref: Any, images: dict[Any, Any], boxes: dict[Any, Any], home: Path, asked: str
) -> list[Question]:
    if not isinstance(ref, dict):
        raise Fault("this is not a reference")
    kind, name = text_of(ref, "split"), name_of(ref, "ref_id")
    image, box = images.get(_whole(ref, "image_id")), boxes.get(_whole(ref, "ann_id"))
    if image is None or box is None:
        raise Fault("instances.json has not its image or its box")
    size = (_whole(image, "width"), _whole(image, "height"))
    if min(size) < 1:
        raise Fault("its image has no size")
    corners = _corners(box.get("bbox"))
    file = image_file(home, text_of(image, "file_name"))
    answer = _said(corners, size, asked)
    sentences = ref.get("sentences")
    if not isinstance(sentences, list) or not all(isinstance(s, dict) for s in sentences):
        raise Fault("sentences is not a list of phrases")
    told = (corners, size, asked)
    how = f"Answer with [x1, y1, x2, y2], {ASKED[asked]}."
    texts = [f"{PROMPT} {text_of(s, 'sent')}\n{how}" for s in sentences]
    return [
        Question(f"{name}-{n}", text, (answer,), file, kind, told=told)
        for n, text in enumerate(texts, 1)
    ]


def _whole(record: dict[str, Any], key: str) -> int:
    value = record.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise Fault(f"there is no {key}")
    return value


def _corners(bbox: Any) -> Box:
    """From x, y, width, height, as COCO writes boxes, to two corners."""
    if not isinstance(bbox, list) or len(bbox) != 4:
        raise Fault("bbox is not four numbers")
    if not all(type(v) in (int, float) and abs(v) < 1e6 for v in bbox):
        raise Fault("bbox is not four numbers")
    x, y, width, height = bbox
    if width <= 0 or height <= 0:
        raise Fault("its box is empty")
    return x, y, x + width, y + height


def _said(corners: Box, size: tuple[int, int], asked: str) -> str:
    scale = {"unit": 1, "thousand": 1000, "pixels": 0}[asked]
    parts = [v * scale / size[n % 2] if scale else v for n, v in enumerate(corners)]
    digits = 2 if asked == "unit" else 0
    return "[" + ", ".join(f"{part:.{digits}f}" for part in parts) + "]"


def box_in(said: str, size: tuple[int, int], asked: str) -> Box | None:
    """The first box that an answer names, in pixels, or None."""
    found = _FOUR.search(said)
    if not found:
        return None
    scale = {"unit": 1.0, "thousand": 1000.0, "pixels": 0.0}[asked]
    x1, y1, x2, y2 = (
        float(v) * size[n % 2] / scale if scale else float(v) for n, v in enumerate(found.groups())
    )
    return x1, y1, x2, y2


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes; 0 where either is empty or inside out."""
    areas = [(x2 - x1) * (y2 - y1) if x2 > x1 and y2 > y1 else 0.0 for x1, y1, x2, y2 in (a, b)]
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if min(areas) <= 0 or width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (sum(areas) - shared)


def score(question: Question, said: str) -> float:
    """1 where the box overlaps the true one by an IoU of at least LEAST, else 0."""
    true, size, asked = question.told
    box = box_in(said, size, asked)
    return float(box is not None and iou(box, true) >= LEAST)
