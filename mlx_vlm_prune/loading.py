"""Load a model and its processor from a folder, a hub name, or the built-in scenes.

A checkpoint comes from strangers: its sizes are bounded, its tensors checked against
them by name and shape, and nothing in it is executed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx import nn

from . import fast_blas
from .arrays import to_array
from .checkpoints import backbones
from .checkpoints.checkpoint import DTYPES as CODES
from .checkpoints.checkpoint import as_mlx, is_composed, is_ours
from .checkpoints.errors import UserError
from .checkpoints.files import check_safetensors, read_json
from .checkpoints.generations import MODEL_TYPES
from .checkpoints.hub import found
from .checkpoints.llava_original import pads
from .checkpoints.shapes import BITS, GROUPS, LARGEST, MODES, MOST_LAYERS, check_complete
from .hosts import loading as host
from .image import Preprocessor, siglip_preprocessor
from .language.experts import stacked
from .language.minimind import MiniMindConfig
from .language.mlx_lm import MlxLmConfig
from .learned import read_learned
from .memory import check_fits
from .model import VLM, VLMConfig
from .projector import ProjectorConfig
from .prompt import VICUNA, Tokenizer
from .scenes import CHECKPOINT
from .towers.clip import CLIPConfig
from .towers.siglip import SiglipConfig

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
FLOATS = tuple(DTYPES.values())
PACKED = (mx.uint32, mx.uint8)  # words of quantized weights, and scales that are powers of two
TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")


@dataclass(frozen=True)
class Processor:
    """What turns a prompt and images into ids and pixels."""

    tokenizer: Tokenizer
    image: Preprocessor
    image_token: str
    name: str  # of the checkpoint, as the user gave it
    folder: Path | None = None  # where it lies

    @property
    def is_scenes(self) -> bool:
        """Is this the built-in model, which knows drawn scenes only?"""
        return self.name == "scenes"


def load(
    path_or_hub_name: str | Path | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
) -> tuple[Any, Any]:
    """The model and its processor, ours or mlx-vlm's; without a path, the built-in scenes model.

    `dtype` is float32, float16 or bfloat16; "auto" is the checkpoint's own on a GPU, and
    float32 on a CPU, where half precision is ten times slower.
    Raises UserError, in one sentence, for whatever cannot be loaded.
    """
    fast_blas.load()  # says what is wrong with a library that the user named
    _known(dtype)
    folder = _find(path_or_hub_name, revision)
    if kind := host.kind_of(folder):
        return host.load(folder, kind, _known(dtype))
    found = _read(folder, dtype)
    config, weights = found.config, found.weights
    model = VLM(parse_config(config, folder))
    check_complete(weights, config, folder)
    if how := config.get("quantization"):
        few = {name.removesuffix(".scales") for name in stacked(weights) if ".scales" in name}
        nn.quantize(model, **how, class_predicate=lambda path, _: path in few)
    model.load_weights(list(stacked(weights).items()))
    beside = read_learned(folder, model)
    model.learned = MappingProxyType({**model.learned, **beside})
    model.eval()
    mx.eval(model.parameters())
    name = "scenes" if path_or_hub_name is None else str(path_or_hub_name)
    image = _preprocessor(found.reading, model.config.vision)
    if is_composed(config) and pads(config.get("published", {})):
        image = replace(image, pad=True)
    tokenizer = Tokenizer.from_folder(found.words)
    if is_composed(config) and tokenizer.chat_template is None:
        tokenizer.chat_template = VICUNA
    return model, Processor(tokenizer, image, model.config.image_token, name, folder)


def _known(dtype: str) -> mx.Dtype | None:
    """What weights become; None is the checkpoint's own. UserError for an unknown name."""
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"no dtype is called {dtype!r}; there are auto, {', '.join(DTYPES)}")
    return DTYPES[dtype] if dtype != "auto" else mx.float32 if _on_cpu() else None


@dataclass(frozen=True)
class _Read:
    """A checkpoint as it lies in its folders, its weights in what they are to be in."""

    config: Mapping[str, Any]
    weights: dict[str, mx.array]
    words: Path
    reading: Path | None


def _read(folder: Path, dtype: str) -> _Read:
    """One of our folders, or one as published, brought over."""
    if is_ours(folder):
        config, weights = read_json(folder / "config.json"), _mlx_weights(folder)
        shapes = {name: (array.shape, array.dtype) for name, array in weights.items()}
        target = _check_size(shapes, dtype, folder)
        weights = {name: _as(weights.pop(name), target) for name in shapes}
        return _Read(config, weights, folder, folder)
    source, kinds = as_mlx(folder), {code: DTYPES[name] for name, code in CODES.items()}
    tensors = source.tensors.items()
    target = _check_size({k: (t.shape, kinds.get(t.dtype)) for k, t in tensors}, dtype, folder)
    weights = {name: _as(to_array(tensor), target) for name, tensor in tensors}
    return _Read(source.config, weights, source.tokenizer, source.reading)


def _as(array: mx.array, target: mx.Dtype) -> mx.array:
    """Read at once, so that the array it was made from is let go before the next is read."""
    made = array.astype(target) if array.dtype in FLOATS else array
    mx.eval(made)
    return made


def _check_size(shapes: Mapping[str, tuple[Any, Any]], dtype: str, where: Path) -> mx.Dtype:
    """What the weights are to be in; UserError where they would not fit into memory.

    `shapes` are shape and type of each. What they are in now is not counted on top: tensors are
    read and changed one after another, and each old one is let go. Experts count twice, since
    they are put together while all are there.
    """
    norms = (n for n in shapes if n.startswith("language.") and n.endswith("norm.weight"))
    own = shapes.get(next(norms, ""), ((), mx.float32))[1] or mx.float32
    target = _known(dtype) or own
    needed = sum(
        prod(shape)
        * (target.size if kind in FLOATS else kind.size if kind else 0)
        * (2 if ".experts." in name else 1)
        for name, (shape, kind) in shapes.items()
    )
    check_fits(needed, str(where))
    return target


def _preprocessor(folder: Path | None, vision: CLIPConfig) -> Preprocessor:
    """The one in the folder, or the tower's usual; it must make the pictures the tower reads."""
    side = vision.image_size
    usual = Preprocessor(size=side, crop=(side, side))
    if isinstance(vision, SiglipConfig):
        usual = siglip_preprocessor(side)
    if folder is None:
        return usual
    image = Preprocessor.from_folder(folder, usual)
    if (image.crop or image.size) != (side, side):
        raise UserError(
            f"{folder / 'preprocessor_config.json'} makes pictures of {image.crop or image.size}"
            f" pixels, but the tower reads {side} x {side}"
        )
    return image


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _find(path_or_hub_name: str | Path | None, revision: str | None) -> Path:
    path = CHECKPOINT if path_or_hub_name is None else found(path_or_hub_name, revision)
    if not path.is_dir():
        raise UserError(
            f"{path} is a file; a model is a folder (see python -m mlx_vlm_prune convert to-mlx)"
        )
    return path


def _mlx_weights(folder: Path) -> dict[str, mx.array]:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no model.safetensors")
    weights: dict[str, mx.array] = {}
    for file in files:
        check_safetensors(file)  # mx.load accepts what the format forbids
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        weights |= arrays
    for name, array in weights.items():
        packed = f"{name.rpartition('.')[0]}.scales" in weights
        if array.dtype not in (*FLOATS, *(PACKED if packed else ())):
            raise UserError(f"{folder}: tensor {name} is {array.dtype}, not {', '.join(DTYPES)}")
    return weights


def parse_config(config: Mapping[str, Any], where: Path) -> VLMConfig:
    """The part of a config.json that shapes the model, every size checked."""
    if config.get("model_type") not in MODEL_TYPES:
        raise UserError(
            f"{where} holds a {config.get('model_type')!r} model; supported are "
            f"{', '.join(MODEL_TYPES)}"
        )
    pruner = config.get("pruner")
    learned = None
    if pruner is not None:
        learned = ("attention_pool", _size(pruner, "tokens", where))
        if pruner.get("name") != learned[0]:
            raise UserError(f"{where}: no learned pruner is called {pruner.get('name')!r}")
    told = config.get("vision_config")
    kind = told.get("model_type", TOWERS[0]) if isinstance(told, Mapping) else TOWERS[0]
    if kind not in TOWERS:
        raise UserError(f"{where}: no tower is called {kind!r}; there are {', '.join(TOWERS)}")
    vision = _fill(
        CLIPConfig if kind == TOWERS[0] else SiglipConfig, config, "vision_config", where
    )
    text = _text(config, where)
    _check_quantization(config, where)
    if vision.image_size % vision.patch_size or vision.hidden_size % vision.num_attention_heads:
        raise UserError(f"{where}: vision_config's sizes do not divide evenly")
    if vision.feature_layers > vision.num_hidden_layers:
        raise UserError(f"{where}: the tower has no layer {vision.feature_layers} to read from")
    projector = _projector(config.get("projector"), vision, where)
    token, token_id = str(config.get("image_token", "@")), config.get("image_token_id", 34)
    if type(token_id) is not int or not 0 <= token_id < text.vocab_size:
        raise UserError(f"{where}: image_token_id is {token_id!r}, none of the vocabulary's")
    return VLMConfig(vision, text, projector, token, token_id, learned)


def _text(config: Mapping[str, Any], where: Path) -> MiniMindConfig | MlxLmConfig:
    told = config.get("text_config")
    if isinstance(told, Mapping) and backbones.is_backbone(told):
        backbones.check(told, where / "config.json")
        return MlxLmConfig.of(told)
    text = _fill(MiniMindConfig, config, "text_config", where)
    if text.hidden_size % text.num_attention_heads or text.head_dim % 2:
        raise UserError(f"{where}: text_config's heads do not divide hidden_size evenly")
    if text.num_attention_heads % text.num_key_value_heads:
        raise UserError(f"{where}: text_config's key/value heads do not divide its heads")
    if text.num_experts and not 1 <= text.num_experts_per_tok <= text.num_experts:
        raise UserError(f"{where}: a token cannot choose {text.num_experts_per_tok} experts")
    return text


def _projector(told: Any, vision: CLIPConfig, where: Path) -> ProjectorConfig | None:
    if told is None:
        return None
    given = told.get("merge") if isinstance(told, Mapping) else None
    listed = given if isinstance(given, list) and len(given) == 2 else []
    merge = [m for m in listed if type(m) is int]
    if len(merge) != 2 or any(m < 1 or n % m for m, n in zip(merge, vision.grid, strict=True)):
        raise UserError(f"{where}: the projector's merge must be two divisors of the grid's sides")
    if not isinstance(told.get("norm"), bool):
        raise UserError(f"{where}: the projector's norm is {told.get('norm')!r}, not true or false")
    return ProjectorConfig((merge[0], merge[1]), told["norm"])


def _check_quantization(config: Mapping[str, Any], where: Path) -> None:
    how = config.get("quantization")
    if how is None:
        return
    known = isinstance(how, Mapping) and set(how) <= {"bits", "group_size", "mode"}
    mode = how.get("mode", "affine") if known else None
    if mode not in [*MODES] or how.get("bits") not in BITS or how.get("group_size") not in GROUPS:
        raise UserError(
            f"{where}: quantization is {how!r}, which no mode of {', '.join(MODES)} has"
        )


def _fill(kind: type, config: Mapping[str, Any], part: str, where: Path) -> Any:
    given = config.get(part)
    if not isinstance(given, Mapping):
        raise UserError(f"{where / 'config.json'} has no {part}")
    values = {}
    for f in fields(kind):
        if isinstance(f.default, bool):
            values[f.name] = given.get(f.name, f.default)
            if not isinstance(values[f.name], bool):
                raise UserError(f"{where / 'config.json'}: {f.name} must be true or false")
        elif f.default == 0 and f.name not in given:
            values[f.name] = 0
        elif f.type is float or f.type == "float":
            values[f.name] = _positive(given, f.name, where)
        else:
            values[f.name] = _size(given, f.name, where)
    return kind(**values)


def _positive(given: Mapping[str, Any], name: str, where: Path) -> float:
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        raise UserError(f"{where / 'config.json'}: {name} is {value!r}, not a positive number")
    return float(value)


def _size(given: Mapping[str, Any], name: str, where: Path) -> int:
    value = given.get(name) if isinstance(given, Mapping) else None
    most = MOST_LAYERS if "layers" in name else LARGEST
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UserError(
            f"{where / 'config.json'}: {name} is {value!r}, not a whole number from 1 to {most}"
        )
    return value
