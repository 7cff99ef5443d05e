"""mlx-vlm's server, while it serves a model that prunes: a refused request alone gets its error.

The server answers all its requests in one thread. An error while it embeds a prompt ends every
answer that is under way. An error while it queues the prompt's ids is that request's own. So the
ids of a refused prompt raise its error there. This is put on the server's instance, of no class.

The two functions are no interface of mlx-vlm's. A server without them prunes, too, and it is said
once that an error will end every answer.
"""

import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import proxy, ref

from ..checkpoints.errors import UserError

logger = logging.getLogger("mlx_vlm_prune")
SERVER = "mlx_vlm.server.generation"
EMBED = "_gpu_embed"  # the server's function that asks a model for embeddings


class RefusedIds:
    """In place of a prompt's ids (1, L): their length, items and attributes raise its error."""

    def __init__(self, problem: UserError):
        self._problem = problem

    def __getattr__(self, name: str) -> Any:
        raise self._problem

    def _refuse(self, *_: Any) -> Any:
        raise self._problem

    __getitem__ = __iter__ = __len__ = _refuse


class ServerGuard:
    """Keeps the server that has loaded a model from ending all answers for one prompt's error."""

    def __init__(self, model: Any):
        self._model = ref(model)
        self._server: Callable[[], Any] = lambda: None  # a weak reference
        self._has_warned = False

    def watch(self) -> None:
        """Take care of the server, if there is one by now."""
        server = _running_server()
        if server is None or server is self._server():
            return
        held = getattr(server, "model", None)  # None while it loads a model that prunes by itself
        if held is not None and held is not self._model():
            return
        if not hasattr(server, EMBED):
            if not self._has_warned:
                logger.warning(
                    "this version of mlx-vlm's server has no %s: a prompt that is refused ends the"
                    " answers beside it, too", EMBED,
                )  # fmt: skip
            self._has_warned = True
            return
        self.release()
        self._server = ref(server)
        setattr(server, EMBED, _refusing(partial(getattr(type(server), EMBED), proxy(server))))

    def release(self) -> None:
        """Leave the server as it was."""
        if (server := self._server()) is not None:
            vars(server).pop(EMBED, None)
        self._server = lambda: None


def _running_server() -> Any:
    """mlx-vlm's server; while it loads its model, it is what this thread runs."""
    module = sys.modules.get("mlx_vlm.server.runtime")
    if module is None:
        return None
    target = getattr(threading.current_thread(), "_target", None)
    owner = getattr(target, "__self__", None)
    is_loading = type(owner).__module__ == SERVER and getattr(owner, "model", None) is None
    return owner if is_loading else module.runtime.response_generator


def _refusing(embed: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., Any]:
    """The server's function, but that a UserError becomes the prompt's ids."""

    def embed_or_refuse(*inputs: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return embed(*inputs, **options)
        except UserError as problem:
            return RefusedIds(problem), {}

    return embed_or_refuse
