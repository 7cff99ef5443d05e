"""Adapters in a language model, by mlx-lm's own layers and in the files that mlx-lm writes.

LoRA is arXiv:2106.09685, DoRA arXiv:2402.09353.
FOLDER/adapter_config.json says which matrices have one, FOLDER/adapters.safetensors holds them,
under the names of the model's own modules. A projector that learned along lies there whole.
"""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.adapters import CONFIG, WEIGHTS, AdapterConfig
from ..checkpoints.errors import UserError, missing_package
from ..checkpoints.reading.files import CHUNK
from ..checkpoints.reading.paths import LARGEST_JSON, check_regular
from ..checkpoints.reading.weights import check_learned
from .arrays import read_arrays
from .language.experts import ExpertLinear, QuantizedExpertLinear
from .language.minimind import MiniMind
from .language.mlx_lm import MlxLm
from .vlm import VLM

LINEAR, EXPERTS = (nn.Linear, nn.QuantizedLinear), (ExpertLinear, QuantizedExpertLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)


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
    # What mlx-lm's function reads of a model: layers that are modules, and the names of all.
    target: Any = SimpleNamespace(
        layers=layers,
        named_modules=language.named_modules,
        update_modules=language.update_modules,
    )
    parameters["keys"] = config.keys(in_layers, beside)
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
    """A fingerprint of the adapters in a folder. Raises UserError where they cannot be read."""
    digest = hashlib.sha256()
    for name, most in ((CONFIG, LARGEST_JSON), (WEIGHTS, None)):
        file = Path(folder) / name
        check_regular(file, most)
        try:
            with file.open("rb") as stream:
                while piece := stream.read(CHUNK):
                    digest.update(piece)
        except OSError as e:
            raise UserError(f"cannot read {file}: {e.strerror or e}") from None
    return digest.hexdigest()[:16]


def load_adapters(model: VLM, folder: str | Path) -> list[str]:
    """Give a model the adapters in a folder; the names of all tensors there.

    Raises UserError where they do not fit the model.
    """
    folder = Path(folder)
    config = AdapterConfig.read(folder)
    check_learned(folder / WEIGHTS)
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
                f"the adapters in {folder} do not fit this model: {name} is {there} in the"
                f" file, and {here} in the model"
            )
    casted = [(name, array.astype(expected[name].dtype)) for name, array in weights.items()]
    model.load_weights(casted, strict=False)
    model.eval()
    mx.eval(model.parameters())
    return list(weights)
