"""Fewer visual tokens for vision-language models, on MLX.

from mlx_vlm_prune import load, generate

model, processor = load()
answer = generate(model, processor, "What colour is the star?", image="scene.png",
                  pruner="avgpool", keep_tokens=49)
"""

from .checkpoints.startup import watch_start

watch_start()

import importlib  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

from .checkpoints.version import __version__  # noqa: E402
from .machine import blas  # noqa: E402

blas.prepare()  # whatever of ours is imported first: before mlx, or never

if TYPE_CHECKING:
    from .chat import Chat
    from .checkpoints.errors import UserError
    from .encode import encode_images, encode_texts, load_encoder
    from .generate import batch_generate, generate, stream_generate
    from .generation.result import GenerationResponse, GenerationResult
    from .hosts.attach import attach, pruned
    from .hosts.loading import load
    from .pruners import METHODS as PRUNERS
    from .pruners import Pruner, Reduction, Signals, Stage, register_pruner

__all__ = [
    "PRUNERS", "Chat", "GenerationResponse", "GenerationResult", "Pruner", "Reduction", "Signals",
    "Stage", "UserError", "__version__", "attach", "batch_generate", "encode_images",
    "encode_texts", "generate", "load", "load_encoder", "pruned", "register_pruner",
    "stream_generate",
]  # fmt: skip

# Nothing heavy is imported before it is used. The module generate.py is itself callable.
_HOME = {
    "load": "hosts.loading",
    "generate": "generate",
    "batch_generate": "generate",
    "stream_generate": "generate",
    "Chat": "chat",
    "encode_images": "encode",
    "encode_texts": "encode",
    "load_encoder": "encode",
    "GenerationResponse": "generation.result",
    "GenerationResult": "generation.result",
    "UserError": "checkpoints.errors",
    "PRUNERS": "pruners",
    "Pruner": "pruners",
    "Reduction": "pruners",
    "Signals": "pruners",
    "Stage": "pruners",
    "register_pruner": "pruners",
    "attach": "hosts.attach",
    "pruned": "hosts.attach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f".{_HOME[name]}", __name__)
    if name == "generate":
        return home  # callable, and what the import system binds the name to anyway
    return home.METHODS if name == "PRUNERS" else getattr(home, name)


def __dir__() -> list[str]:
    """The exported names, also before they are imported."""
    return sorted({*globals(), *__all__})
