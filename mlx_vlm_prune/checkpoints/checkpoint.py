"""A checkpoint as we hold it, whichever family it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reading.tensors import RawTensor

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # safetensors' names of them
LEARNED_FILE = "pruners.safetensors"  # weights of learned pruners, beside a model of ours


@dataclass(frozen=True)
class Checkpoint:
    """Our config.json, the tensors under our names, and the folders of the other files.

    `heads_assumed`: no file says how many attention heads there are. `learned_file` is the file of
    learned pruners' weights, `learned` what is to be added to it, as METHOD.parameter. Files that
    are only carried along lie in `carried_folder`.
    """

    config: dict[str, Any]
    tensors: dict[str, RawTensor]
    tokenizer_folder: Path
    preprocessor_folder: Path | None
    heads_assumed: bool = False
    learned_file: Path | None = None
    learned: Mapping[str, RawTensor] = field(default_factory=dict)
    carried_folder: Path | None = None


def language_dtype(tensors: Mapping[str, RawTensor]) -> str:
    """The language model's dtype, as config.json calls it."""
    code = next(tensor.dtype for name, tensor in tensors.items() if name.startswith("language."))
    return next(name for name, each in DTYPES.items() if each == code)
