"""`to-mlx --twig`: a twig as TwigVLM publishes it (arXiv:2503.14075), for one of our models.

Its file holds the twig's layers, norm and output layer, under Llama's names. No file tells which
layer of the base they grow on.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_vlm_prune.checkpoints.config import CONFIG, MlxLmConfig, VLMConfig, parse_sizes
from mlx_vlm_prune.checkpoints.errors import UserError
from mlx_vlm_prune.checkpoints.minimind.tables import LLAMA
from mlx_vlm_prune.checkpoints.names.rules import to_published
from mlx_vlm_prune.checkpoints.reading.tensors import RawTensor
from mlx_vlm_prune.checkpoints.reading.weights import check_finite, read_weights
from mlx_vlm_prune.checkpoints.shapes import expected_shapes

HEAD = "lm_head.weight"


def read_twig(path: Path, layer: int, config: Mapping[str, Any]) -> dict[str, RawTensor]:
    """The twig's tensors under the names of pruners.safetensors; `config` is the model's.

    Raises UserError for a model that no twig grows on, a layer that it lacks, and a tensor that
    is missing, misshapen or one too many.
    """
    sizes = parse_sizes(config, Path(CONFIG))
    if isinstance(sizes.text, MlxLmConfig):
        raise UserError(f"{path}: a twig does not grow on a language model of mlx-lm's")
    depth, state = sizes.text.num_hidden_layers, read_weights(path)
    if not 1 <= layer < depth:
        raise UserError(f"twig_layer is {layer}; here a twig grows on layer 1 to {depth - 1}")
    layers = len({name.split(".")[2] for name in state if name.startswith("model.layers.")})
    if not 1 <= layers <= depth:
        raise UserError(f"{path} has {layers} layers; a twig of this model has 1 to {depth}")
    expected = _expected(layers, sizes)
    for name in expected | state:
        _, shape = expected.get(name, ("", None))
        held = state[name].shape if name in state else None
        if held != shape:
            raise UserError(f"{path}: tensor {name} is {held}; a twig of this model has {shape}")
        check_finite(name, state[name], path)
    layer_tensor = RawTensor("F32", (1,), np.array([layer], "<f4").view(np.uint8))
    return {"twig.layer": layer_tensor} | {
        expected[name][0]: tensor for name, tensor in state.items()
    }


def _expected(layers: int, sizes: VLMConfig) -> dict[str, tuple[str, tuple[int, ...] | None]]:
    """Our name and the shape of each tensor, by published name: as in the base's own layers."""
    shapes = expected_shapes(replace(sizes, quantization=None))
    first, expected = "language.layers.0.", {}
    ours = {
        f"language.layers.{i}.{key.removeprefix(first)}": shape
        for i in range(layers)
        for key, shape in shapes.items()
        if key.startswith(first)
    }
    ours["language.norm.weight"] = shapes["language.norm.weight"]
    for name, shape in ours.items():
        rule = to_published(LLAMA, name)
        assert rule, name
        expected[rule[0]] = name.replace("language.", "twig.", 1), shape
    return {**expected, HEAD: ("twig.head.weight", shapes["language.embed_tokens.weight"])}
