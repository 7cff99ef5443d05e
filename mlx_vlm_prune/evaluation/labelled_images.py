"""Image files with their classes, and the texts that stand for classes.

Classes are given as torchvision and Hugging Face's `datasets` have them: a sub-folder for each, or
a CSV file with the columns file_name and label.
"""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoints.command_line import either
from ..checkpoints.errors import UserError

SUFFIXES = tuple(f".{kind}" for kind in "bmp gif heic heif jpeg jpg png tif tiff webp".split())
FILE, LABEL = "file_name", "label"
MARK = "{}"  # of a class in a template
TEMPLATES = {"CLIP": "a photo of a {}.", "SigLIP": "This is a photo of {}."}  # the authors'


@dataclass(frozen=True)
class ImageFile:
    """`name` is its path within the folder that was given."""

    path: Path
    name: str
    label: str | None = None


def find_images(sources: Sequence[Path], labels: Path | None = None) -> list[ImageFile]:
    """The images of files and folders, each once, in the order of their names within each folder.

    In a folder the sub-folder is the class; `labels` is a CSV file in its place. Raises UserError
    where there is no image, or the file is not such a one.
    """
    by_path: dict[str, ImageFile] = {}
    for image in (image for source in sources for image in _images_of(source)):
        place = os.path.abspath(image.path)
        if place not in by_path or by_path[place].label is None:
            by_path[place] = image
    images = list(by_path.values())
    if not images:
        raise UserError(f"there is no image ({', '.join(SUFFIXES)}) in {either(map(str, sources))}")
    if labels is None:
        return images
    label_of, names = read_labels(labels), {image.name for image in images}
    if missing := [name for name in label_of if name not in names]:
        raise UserError(f"{labels} names {missing[0]}, which is none of the {len(images)} images")
    return [replace(image, label=label_of.get(image.name)) for image in images]


def _images_of(source: Path) -> list[ImageFile]:
    if not source.is_dir():
        return [ImageFile(source, source.name)]  # what is wrong with it is said when it is opened
    images = []
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        is_hidden = any(part.startswith(".") for part in parts)
        if path.suffix.lower() in SUFFIXES and not is_hidden and path.is_file():
            images.append(ImageFile(path, "/".join(parts), parts[0] if len(parts) > 1 else None))
    return images


def read_labels(file: Path) -> dict[str, str]:
    """The class of each image that a CSV file names. Raises UserError."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as opened:
            rows = list(csv.DictReader(opened, strict=True))
    except OSError as problem:
        raise UserError(f"cannot read {file}: {problem.strerror or problem}") from None
    except (ValueError, csv.Error) as problem:
        raise UserError(f"{file} is no CSV file: {problem}") from None
    labels: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        name, label = row.get(FILE), row.get(LABEL)
        if not name or not label:
            raise UserError(
                f"{file}, line {number}: there must be a {FILE} and a {LABEL}, under a first line"
                " with these names"
            )
        if labels.setdefault(name, label) != label:
            raise UserError(f"{file}, line {number}: {name} has another label above")
    return labels


def texts_of_classes(
    labels: Sequence[str], texts: Sequence[str], template: str
) -> tuple[list[str], dict[str, int]]:
    """The texts to choose among, and the number of each class's text.

    Without `texts` each class has one of `template`; with them a class is a text, or words of one
    text only. Raises UserError for a class without its text.
    """
    classes = sorted(set(labels))
    if not texts:
        if MARK not in template:
            raise UserError(f"template is {template!r}; it must have {MARK}, the class's place")
        class_texts = [template.replace(MARK, _words(name)) for name in classes]
        return class_texts, {name: number for number, name in enumerate(classes)}
    return list(texts), {name: _text_of(name, texts) for name in classes}


def _text_of(label: str, texts: Sequence[str]) -> int:
    """Raises UserError unless it is one."""
    words = rf"(?<!\w){re.escape(_words(label))}(?!\w)"
    equal = [i for i, text in enumerate(texts) if text in (label, _words(label))]
    having = equal or [i for i, text in enumerate(texts) if re.search(words, text, re.IGNORECASE)]
    if len(having) != 1:
        count = "none" if not having else f"{len(having)}"
        raise UserError(
            f"the class {label!r} is in {count} of the {len(texts)} texts; it must be in one"
        )
    return having[0]


def _words(label: str) -> str:
    """A folder's name as words: hot_dog is hot dog."""
    return label.replace("_", " ")
