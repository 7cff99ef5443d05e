"""Load a model and its processor from a folder, a hub name, or the built-in scenes.

A checkpoint comes from strangers: its sizes are bounded, its tensors checked against
them by name and shape, and nothing in it is executed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from . import fast_blas

fast_blas.prepare()  # before the first import of mlx, or never

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from convert.checkpoint import MODEL_TYPE, as_mlx, is_mlx  # noqa: E402
from convert.errors import UserError  # noqa: E402
from convert.files import RawTensor, check_safetensors, read_json  # noqa: E402
from convert.shapes import check_complete  # noqa: E402

from .image import Preprocessor  # noqa: E402
from .language.minimind import MiniMindConfig  # noqa: E402
from .learned import read_learned  # noqa: E402
from .model import VLM, VLMConfig  # noqa: E402
from .prompt import Tokenizer  # noqa: E402
from .scenes import CHECKPOINT  # noqa: E402
from .towers.clip import CLIPConfig  # noqa: E402

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
LARGEST = 1 << 20  # of any size in a config.json
MOST_LAYERS = 512


@dataclass(frozen=True)
class Processor:
    """What turns a prompt and images into ids and pixels."""

    tokenizer: Tokenizer
    image: Preprocessor
    image_token: str
    name: str  # of the checkpoint, as the user gave it

    @property
    def is_scenes(self) -> bool:
        """Is this the built-in model, which knows drawn scenes only?"""
        return self.name == "scenes"


def load(
    path_or_hub_name: str | Path | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
) -> tuple[VLM, Processor]:
    """The model and its processor; without a path, the built-in scenes model.

    `dtype` is float32, float16 or bfloat16; "auto" is the checkpoint's own on a GPU, and
    float32 on a CPU, where half precision is ten times slower.
    Raises UserError, in one sentence, for whatever cannot be loaded.
    """
    fast_blas.load()  # says what is wrong with a library that the user named
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"no dtype is called {dtype!r}; there are auto, {', '.join(DTYPES)}")
    folder = _find(path_or_hub_name, revision)
    reading: Path | None = folder
    words = folder
    if is_mlx(folder):
        config, weights = read_json(folder / "config.json"), _mlx_weights(folder)
    else:
        source = as_mlx(folder)
        config, words, reading = source.config, source.tokenizer, source.reading
        weights = {name: _to_mlx(tensor) for name, tensor in source.tensors.items()}
    model = VLM(parse_config(config, folder))
    check_complete(weights, config, folder)
    own = weights["language.embed_tokens.weight"].dtype
    target = DTYPES[dtype] if dtype != "auto" else mx.float32 if _on_cpu() else own
    model.load_weights([(name, array.astype(target)) for name, array in weights.items()])
    beside = read_learned(folder, model.config.vision.hidden_size)
    model.learned = MappingProxyType({**model.learned, **beside})
    model.eval()
    mx.eval(model.parameters())
    name = "scenes" if path_or_hub_name is None else str(path_or_hub_name)
    image = _preprocessor(reading, model.config.vision.image_size)
    return model, Processor(Tokenizer.from_folder(words), image, model.config.image_token, name)


def _preprocessor(folder: Path | None, side: int) -> Preprocessor:
    """The one in the folder, or CLIP's own; it must make the pictures the tower reads."""
    if folder is None:
        return Preprocessor(size=side, crop=(side, side))
    image = Preprocessor.from_folder(folder)
    if (image.crop or image.size) != (side, side):
        raise UserError(
            f"{folder / 'preprocessor_config.json'} makes pictures of {image.crop or image.size}"
            f" pixels, but the tower reads {side} x {side}"
        )
    return image


def _on_cpu() -> bool:
    return mx.default_device().type == mx.DeviceType.cpu


def _find(path_or_hub_name: str | Path | None, revision: str | None) -> Path:
    if path_or_hub_name is None:
        return CHECKPOINT
    path = Path(path_or_hub_name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path} is a file; a model is a folder (see python -m convert to-mlx)")
    name = str(path_or_hub_name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"no folder {path}, and {name!r} is no hub name (owner/name) either")
    return _from_hub(name, revision)


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.jinja", "*.safetensors"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"no folder {name}, and the hub did not give it: {reason}") from None


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
        if array.dtype not in DTYPES.values():
            raise UserError(f"{folder}: tensor {name} is {array.dtype}, not {', '.join(DTYPES)}")
    return weights


def _to_mlx(tensor: RawTensor) -> mx.array:
    """The same bits as an mx.array; numpy has no bfloat16, so bits travel as integers."""
    kind = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[tensor.dtype]
    integer = np.uint32 if kind == "float32" else np.uint16
    bits = np.frombuffer(bytes(tensor.data), dtype=integer).reshape(tensor.shape)
    return mx.array(bits).view(DTYPES[kind])


def parse_config(config: Mapping[str, Any], where: Path) -> VLMConfig:
    """The part of a config.json that shapes the model, every size checked."""
    if config.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{where} holds a {config.get('model_type')!r} model; {MODEL_TYPE} is supported"
        )
    pruner = config.get("pruner")
    learned = None
    if pruner is not None:
        learned = ("attention_pool", _size(pruner, "tokens", where))
        if pruner.get("name") != learned[0]:
            raise UserError(f"{where}: no learned pruner is called {pruner.get('name')!r}")
    vision = _fill(CLIPConfig, config, "vision_config", where)
    text = _fill(MiniMindConfig, config, "text_config", where)
    if vision.image_size % vision.patch_size or vision.hidden_size % vision.num_attention_heads:
        raise UserError(f"{where}: vision_config's sizes do not divide evenly")
    if text.hidden_size % text.num_attention_heads or text.head_dim % 2:
        raise UserError(f"{where}: text_config's heads do not divide hidden_size evenly")
    if text.num_attention_heads % text.num_key_value_heads:
        raise UserError(f"{where}: text_config's key/value heads do not divide its heads")
    token = config.get("image_token", "@")
    return VLMConfig(vision, text, str(token), int(config.get("image_token_id", 34)), learned)


def _fill(kind: type, config: Mapping[str, Any], part: str, where: Path) -> Any:
    given = config.get(part)
    if not isinstance(given, Mapping):
        raise UserError(f"{where / 'config.json'} has no {part}")
    values = {}
    for f in fields(kind):
        if f.type is float or f.type == "float":
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
