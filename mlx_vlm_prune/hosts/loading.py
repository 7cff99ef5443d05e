"""`load`: a model of ours or of mlx-vlm's, and its processor; a folder's config.json says whose.

Some checkpoints name code of their own, which mlx-vlm would run; here nothing from a folder is run.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.command_line import either
from ..checkpoints.config import CONFIG
from ..checkpoints.errors import UserError, quoted, whole_reason
from ..checkpoints.families import foreign_kind
from ..checkpoints.llava import published as llava
from ..checkpoints.mlx_vlm_folder import RECORD
from ..checkpoints.processor import TOKENIZER, check_tokenizer_file, end_ids, end_tokens
from ..checkpoints.reading.fields import MOST_LAYERS
from ..checkpoints.reading.files import LARGEST_SIZE, open_safetensors, read_json
from ..checkpoints.reading.paths import LARGEST_TOKENIZER, check_regular, find_files
from ..checkpoints.reading.weights import check_dtypes, read_folder
from ..checkpoints.tokenizer_trial import TokenizerTrial, is_panic
from ..inputs.processor import check_vocabulary
from ..machine import blas
from ..models.adapters import adapter_key, load_adapters
from ..models.loading import find_folder, load_folder, weights_dtype
from . import adapters
from .families import FAMILIES, REFUSED, host_of
from .host import ADAPTERS, TRIAL
from .linked_folder import mlx_vlm_weight_files
from .llava_processor import LLAVA, mend
from .memory import check_memory

logger = logging.getLogger("mlx_vlm_prune")
# What mlx-vlm and transformers read of a folder, beside the weights.
READ_FILES = (
    "*config*.json", "*token*.json", "*.index.json", "*template*.json", "vocab*", "merges.txt",
    "tekken.json", "*.model", "*.jinja", "additional_chat_templates/*.jinja",
)  # fmt: skip
DEPTH = re.compile("(layer|depth|expert)s?$")  # fields that count what is made one by one
INSTALL = "install it with pip install 'mlx-vlm-prune[mlx-vlm]'"
REMOTE_CODE = (
    "trust_remote_code is not possible: pruning works inside models that are known here, and no"
    " code from a model's folder is run; leave it out"
)


def load(
    path_or_hub_name: str | Path | None = None,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """The model and its processor, ours or mlx-vlm's; without a path, the built-in scenes model.

    `dtype` is float32, float16 or bfloat16; "auto" is the checkpoint's own on a GPU, and
    float32 on a CPU, where half precision is ten times slower. `adapter_path` is a folder of
    adapters that were trained for this model. `trust_remote_code` is refused: no code is run.
    Raises UserError, in one sentence, for whatever cannot be loaded.
    """
    if trust_remote_code:
        raise UserError(REMOTE_CODE)
    blas.load()  # says what is wrong with a library that the user named
    target = weights_dtype(dtype)
    folder = find_folder(path_or_hub_name, revision)
    if kind := kind_of(folder):
        return _load_mlx_vlm(folder, kind, target, adapter_path)
    name = "scenes" if path_or_hub_name is None else str(path_or_hub_name)
    try:
        model, processor = load_folder(folder, name, dtype)
    except UserError:
        if (kind := foreign_kind(folder)) is None:
            raise
        raise UserError(
            f"{folder} is a {kind} model, and there is no pruning in those; there is in MiniMind-V"
            f" and in {either(FAMILIES)} models"
        ) from None
    if adapter_path:
        load_adapters(model, adapter_path)
        mx.eval(model)
        processor = replace(processor, folder=None)  # what is known of the base is not of this
    return model, processor


def kind_of(folder: Path) -> str | None:
    """The model_type in a folder's config.json, if it is one that mlx-vlm runs for us.

    A LLaVA may be one for our own decoder: see `is_for_our_decoder`.
    Raises UserError, with the reason, for a model that has no visual tokens to prune.
    """
    file = folder / "config.json"
    config = read_json(file) if file.is_file() else {}
    kind = config.get("model_type")
    if isinstance(record := config.get(RECORD), dict):
        raise UserError(
            f"{folder} prunes by itself ({record.get('pruner')}), for mlx-vlm to run; here give the"
            " folder that it was made from, and a pruner"
        )
    if isinstance(kind, str) and kind in REFUSED:
        raise UserError(f"{folder} is a {kind} model: {REFUSED[kind]}")
    if not isinstance(kind, str) or kind not in FAMILIES:
        return None
    return None if llava.is_llava_folder(folder) and llava.is_for_our_decoder(folder) else kind


def _load_mlx_vlm(
    folder: Path, kind: str, dtype: mx.Dtype | None, adapter_path: str | Path | None
) -> tuple[Any, Any]:
    """What mlx-vlm's own `load` returns, in another dtype if one is given.

    Raises UserError, in one sentence, for whatever cannot be loaded.
    """
    trial = _check_files(folder, dtype)
    logger.info("importing mlx-vlm for a %s model; this takes some seconds", kind)
    try:
        from mlx_vlm.utils import load as mlx_vlm_load
    except ImportError as problem:
        raise UserError(f"a {kind} model needs mlx-vlm: {INSTALL} ({problem})") from None
    with _in_one_sentence(folder):
        # Lazy: a weight is read and changed in one step, so that no second copy of all is held.
        model, processor = mlx_vlm_load(str(folder), lazy=True, trust_remote_code=False)
    _check_words(model, processor, folder)
    _add_ends(model, processor, folder)
    if trial:
        setattr(model, TRIAL, trial)
    if kind == LLAVA:
        mend(processor)
    if adapter_path:
        with _in_one_sentence(folder):
            adapters.load_adapters(model, adapter_path)
        setattr(model, ADAPTERS, adapter_key(adapter_path))
    with _in_one_sentence(folder):
        if dtype is not None:
            model.set_dtype(dtype)
        mx.eval(model)  # what is left lazy can be computed in this thread only
    return model, processor


@contextmanager
def _in_one_sentence(folder: Path) -> Iterator[None]:
    """UserError for what fails while a folder is read; mlx-vlm and transformers raise whatever
    comes."""
    try:
        yield
    except UserError:
        raise
    except BaseException as problem:
        if not (is_panic(problem) or isinstance(problem, Exception)):
            raise
        raise UserError(f"mlx-vlm cannot load {folder}: {whole_reason(problem)}") from problem


def _check_files(folder: Path, dtype: mx.Dtype | None) -> TokenizerTrial | None:
    """Before mlx-vlm reads a folder: UserError for what it would read without end or otherwise, and
    for weights that do not fit into memory.

    By what texts must be tried first, where the tokenizer may be slow.
    """
    config = read_json(folder / CONFIG)
    if code := config.get("model_file"):
        raise UserError(
            f"{folder} wants its own {quoted(code)} to be run, and no code from a folder is"
        )
    _check_numbers(config, folder / CONFIG)
    mlx_vlm_weight_files(folder)
    # Counters and positions may be whole numbers.
    tensors = read_folder(folder, open_safetensors)
    check_dtypes(tensors, folder, ("weight", "bias"))
    check_memory(folder, tensors, config, dtype)
    for file in find_files(folder, *READ_FILES):
        if file.exists():  # a link to nothing is a file that is left out, for mlx-vlm
            check_regular(file, LARGEST_TOKENIZER)
    return check_tokenizer_file(folder) if (folder / TOKENIZER).exists() else None


def _check_numbers(config: Any, file: Path) -> None:
    """UserError for numbers that MLX cannot count, and for more layers than any model has: mlx-vlm
    makes them before it looks at the weights."""
    rest = [("", config)]
    while rest:
        name, value = rest.pop()
        if isinstance(value, Mapping):
            rest += value.items()
        elif isinstance(value, list):
            rest += [(name, part) for part in value]
        elif isinstance(value, int):
            most = MOST_LAYERS if DEPTH.search(name) else LARGEST_SIZE
            if abs(value) > most:
                raise UserError(f"{file}: {name} is {quoted(value)}; at most {most} is read")


def _check_words(model: Any, processor: Any, folder: Path) -> None:
    """Raises UserError for a tokenizer that was made for another model."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if backend := getattr(tokenizer, "backend_tokenizer", None):  # not of those in Python
        check_vocabulary(backend, str(folder), len(host_of(model, processor).word_table.weight))


def _add_ends(model: Any, processor: Any, folder: Path) -> None:
    """Have answers end at every token that a file of the folder calls an end: mlx-vlm reads
    generation_config.json, else config.json, and asks the tokenizer."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if (criteria := getattr(tokenizer, "stopping_criteria", None)) is None:
        return
    words = tokenizer.get_vocab()
    ids = end_ids(folder) & {*words.values()}
    ids |= {words[token] for token in end_tokens(folder) if token in words}
    if ids - {*criteria.eos_token_ids}:
        model.config.eos_token_id = sorted(ids | {*criteria.eos_token_ids})  # each request's, too
        criteria.reset(model.config.eos_token_id)
