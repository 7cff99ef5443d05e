"""Adapters in the files that mlx-lm writes: what they are, by its keys, and their tensors."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .command_line import either, suggestion
from .errors import UserError, quoted
from .reading.files import atomic_path, read_json, write_json, write_safetensors
from .reading.tensors import RawTensor

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
KINDS = ("lora", "dora")
DEFAULTS: Mapping[str, Any] = {"rank": 8, "scale": 20.0, "dropout": 0.0}


@dataclass(frozen=True)
class AdapterConfig:
    """Which matrices get adapters and of what size, by mlx-lm's keys.

    `num_layers` counts from the last layer; -1 is all. `lora_parameters` are rank, scale, dropout
    and keys: names of modules in a layer, or of the language model. Without keys each matrix of a
    layer gets one.
    """

    fine_tune_type: str
    num_layers: int
    lora_parameters: Mapping[str, Any]

    @classmethod
    def of(
        cls, kind: Any, num_layers: Any, parameters: Any, where: str = "lora_parameters"
    ) -> "AdapterConfig":
        """Checked, with mlx-lm's values for what is missing. Raises UserError, which says where."""
        if kind not in KINDS:
            raise UserError(
                f"{where}: fine_tune_type is {quoted(kind)}; it must be {either(KINDS)}"
            )
        if type(num_layers) is not int or num_layers < -1 or num_layers == 0:
            raise UserError(
                f"{where}: num_layers is {quoted(num_layers)}; it must be -1 or at least 1"
            )
        if not isinstance(parameters, Mapping):
            raise UserError(f"{where}: lora_parameters must hold keys and values")
        return cls(kind, num_layers, _parameters(parameters, where))

    @classmethod
    def read(cls, folder: Path) -> "AdapterConfig":
        """Of a folder with adapters. Raises UserError."""
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder} with adapters")
        file = folder / CONFIG
        values = read_json(file)
        if "peft_type" in values:
            raise UserError(f"{file} is peft's; adapters of mlx-lm's form are read")
        for key in ("num_layers", "lora_parameters"):
            if key not in values:
                raise UserError(f"{file}: {key} is missing")
        kind = values.get("fine_tune_type", "lora")  # as mlx-lm reads it
        return cls.of(kind, values["num_layers"], values["lora_parameters"], str(file))

    def keys(self, inside: Collection[str], beside: Collection[str] = ()) -> set[str]:
        """Those given, or else all in `inside`, which a layer has; `beside` are others that may
        have an adapter. Raises UserError for a key that names neither."""
        keys = self.lora_parameters.get("keys", sorted(inside))
        allowed = {*inside, *beside}
        for key in keys:
            if key not in allowed:
                raise UserError(
                    f"keys of lora_parameters names {quoted(key)}, to which"
                    f" {self.fine_tune_type} adds no adapter; {suggestion(key, sorted(allowed))}"
                )
        return set(keys)


def _parameters(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked, numbers as numbers: YAML reads 1e1 as a text."""
    if "alpha" in values:
        raise UserError(f"{where}: lora_parameters has alpha; mlx-lm's key is scale, alpha ÷ rank")
    allowed = (*DEFAULTS, "keys")
    for key in values:
        if key not in allowed:
            raise UserError(
                f"{where}: lora_parameters has {quoted(key)}; it may have {either(allowed)}"
            )
    merged: dict[str, Any] = {**DEFAULTS, **values}
    limits = {
        "rank": (int, lambda x: x >= 1, "a whole number of at least 1"),
        "scale": (float, lambda x: math.isfinite(x), "a number"),
        "dropout": (float, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    }
    for key, (kind, fits, words) in limits.items():
        value = merged[key]
        try:
            merged[key] = kind(value)
            fine = not isinstance(value, bool) and float(value) == merged[key] and fits(merged[key])
        except (TypeError, ValueError, OverflowError):
            fine = False
        if not fine:
            raise UserError(
                f"{where}: {key} of lora_parameters is {quoted(value)}; it must be {words}"
            )
    keys = merged.get("keys")
    if keys is None:
        merged.pop("keys", None)
    elif not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{where}: keys of lora_parameters must be a list of modules' names")
    return merged


def write_adapters(
    folder: Path, iteration: int, settings: Mapping[str, Any], tensors: Mapping[str, RawTensor]
) -> None:
    """The newest adapters and those of this step, each file whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / CONFIG, replace=True) as path:
        write_json(path, settings)
    for name in (f"{iteration:07d}_{WEIGHTS}", WEIGHTS):
        with atomic_path(folder / name, replace=True) as path:
            write_safetensors(path, tensors, "mlx")
