"""Adapters in a language model, by mlx-lm's own layers and in the files that mlx-lm writes.

LoRA is arXiv:2106.09685, DoRA arXiv:2402.09353.
FOLDER/adapter_config.json says which matrices have one, FOLDER/adapters.safetensors holds them,
under the names of the model's own modules. A projector that learned along lies there whole.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.command_line import either, suggestion
from ..checkpoints.errors import UserError, missing_package
from ..checkpoints.reading.files import read_json
from .arrays import read_arrays
from .language.experts import ExpertLinear, QuantizedExpertLinear
from .language.minimind import MiniMind
from .language.mlx_lm import MlxLm
from .vlm import VLM

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
KINDS = ("lora", "dora")
DEFAULTS: Mapping[str, Any] = {"rank": 8, "scale": 20.0, "dropout": 0.0}
LINEAR, EXPERTS = (nn.Linear, nn.QuantizedLinear), (ExpertLinear, QuantizedExpertLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


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
            raise UserError(f"{where}: fine_tune_type is {kind!r}; it must be {either(KINDS)}")
        if type(num_layers) is not int or num_layers < -1 or num_layers == 0:
            raise UserError(f"{where}: num_layers is {num_layers!r}; it must be -1 or at least 1")
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


def _parameters(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked, numbers as numbers: YAML reads 1e1 as a text."""
    if "alpha" in values:
        raise UserError(f"{where}: lora_parameters has alpha; mlx-lm's key is scale, alpha ÷ rank")
    allowed = (*DEFAULTS, "keys")
    for key in values:
        if key not in allowed:
            raise UserError(f"{where}: lora_parameters has {key!r}; it may have {either(allowed)}")
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
        except (TypeError, ValueError):
            fine = False
        if not fine:
            raise UserError(f"{where}: {key} of lora_parameters is {value!r}; it must be {words}")
    keys = merged.get("keys")
    if keys is None:
        merged.pop("keys", None)
    elif not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
        raise UserError(f"{where}: keys of lora_parameters must be a list of modules' names")
    return merged


def add_adapters(model: VLM, config: AdapterConfig) -> None:
    """Give the language model adapters that change nothing yet; they are trainable, and what they
    adapt stays as it was. Raises UserError where a key names nothing that can have one."""
    try:
        from mlx_lm.tuner.utils import linear_to_lora_layers
    except ImportError:
        raise missing_package("mlx_lm", "an adapter") from None
    language, parameters = model.language, dict(config.lora_parameters)
    layers = _layers(language)
    in_layers, beside = _adaptable(language, layers, config.fine_tune_type)
    keys = parameters.get("keys", sorted(in_layers))
    for key in keys:
        if key not in in_layers | beside:
            raise UserError(
                f"keys of lora_parameters names {key!r}, to which {config.fine_tune_type} adds no"
                f" adapter; {suggestion(key, sorted(in_layers | beside))}"
            )
    # What mlx-lm's function reads of a model: layers that are modules, and the names of all.
    target: Any = SimpleNamespace(
        layers=layers,
        named_modules=language.named_modules,
        update_modules=language.update_modules,
    )
    parameters["keys"] = set(keys)
    linear_to_lora_layers(
        target, config.num_layers, parameters, use_dora=config.fine_tune_type == "dora"
    )
    _mend_dora(language)


def _layers(language: MiniMind | MlxLm) -> list[nn.Module]:
    body = language[language.family.body] if isinstance(language, MlxLm) else language
    return list(body.layers)


def _adaptable(
    language: MiniMind | MlxLm, layers: list[nn.Module], kind: str
) -> tuple[set[str], set[str]]:
    """The names of what may have an adapter: in a layer, and beside the layers."""
    kinds: tuple[type, ...] = (*LINEAR, *EMBEDDING, *EXPERTS)
    if kind == "dora":  # which mlx-lm has for no experts and no quantized embedding
        kinds = (*LINEAR, nn.Embedding)
    inside = {name for layer in layers for name, m in layer.named_modules() if _is(m, kinds)}
    beside = {
        name
        for name, module in language.named_modules()
        if _is(module, kinds) and ".layers." not in f".{name}"
    }
    return inside, beside


def _is(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    quantized = isinstance(module, nn.QuantizedEmbedding)
    return isinstance(module, kinds) and (not quantized or nn.QuantizedEmbedding in kinds)


def _mend_dora(language: nn.Module) -> None:
    """mlx-lm counts the inputs of a matrix in 3, 5 or 6 bits wrongly."""
    for _, module in language.named_modules():
        linear = module.get("linear")
        if "m" in module and isinstance(linear, nn.QuantizedLinear):
            dims, rank = linear.weight.shape[1] * 32 // linear.bits, module.lora_a.shape[1]
            if module.lora_a.shape[0] != dims:
                bound = 1 / math.sqrt(dims)
                module.lora_a = mx.random.uniform(-bound, bound, (dims, rank))


def adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every adapter in a model, with the name of its module."""
    for name, module in model.named_modules():
        if "lora_a" in module:
            yield name, module


def adapted(adapter: nn.Module) -> nn.Module:
    """The module whose matrix an adapter changes."""
    module: nn.Module = adapter["linear"] if "linear" in adapter else adapter["embedding"]
    return module


def adapter_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The tensors of all adapters, as mlx-lm names them."""
    return {
        f"{name}.{key}": value
        for name, module in adapters(model)
        for key, value in module.items()
        if isinstance(value, mx.array)
    }


def adapter_key(folder: str | Path) -> str:
    """A fingerprint of the adapters in a folder."""
    parts = [(Path(folder) / name).read_bytes() for name in (CONFIG, WEIGHTS)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def load_adapters(model: VLM, folder: str | Path) -> list[str]:
    """Give a model the adapters in a folder; the names of all tensors there.

    Raises UserError where they do not fit the model.
    """
    folder = Path(folder)
    config = AdapterConfig.read(folder)
    weights = read_arrays(folder / WEIGHTS)
    add_adapters(model, config)
    expected = adapter_arrays(model)
    if any(name.startswith("projector.") for name in weights):
        projector: Any = tree_flatten(model.projector.parameters())
        expected |= {f"projector.{name}": array for name, array in projector}
    for name in sorted(expected.keys() | weights.keys()):
        here, there = (x[name].shape if name in x else "none" for x in (expected, weights))
        if here != there:
            raise UserError(
                f"the adapters in {folder} do not fit this model: {name} is {there} there, and"
                f" {here} here"
            )
    casted = [(name, array.astype(expected[name].dtype)) for name, array in weights.items()]
    model.load_weights(casted, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return list(weights)
