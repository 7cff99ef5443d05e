"""mlx-vlm's server, while it serves a model that prunes: a refused request alone gets its error.

The server answers all its requests in one thread. An error while it embeds a prompt ends every
answer that is under way. An error while it queues the prompt's ids is that request's own. So the
ids of a refused prompt raise its error there. This is put on the server's instance, of no class.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import proxy, ref

from ..checkpoints.errors import UserError

EMBED = "_gpu_embed"  # the server's function that asks a model for embeddings


class RefusedIds:
    """In place of a prompt's ids (1, L)."""

    def __init__(self, problem: UserError):
        self.problem = problem

    def squeeze(self, axis: int) -> Any:
        """What the server does first with ids."""
        raise self.problem


class ServerGuard:
    """Keeps the server that has loaded a model from ending all answers for one prompt's error."""

    def __init__(self, model: Any):
        self._model = ref(model)
        self._server: Callable[[], Any] = lambda: None  # a weak reference

    def watch(self) -> None:
        """Take care of the server, if there is one by now."""
        module = sys.modules.get("mlx_vlm.server.runtime")
        server = module and module.runtime.response_generator
        if server is None or server is self._server() or not hasattr(server, EMBED):
            return
        if getattr(server, "model", None) is self._model():
            self.release()
            self._server = ref(server)
            setattr(server, EMBED, _refusing(partial(getattr(type(server), EMBED), proxy(server))))

    def release(self) -> None:
        """Leave the server as it was."""
        if (server := self._server()) is not None:
            vars(server).pop(EMBED, None)
        self._server = lambda: None


def _refusing(embed: Callable[..., tuple[Any, dict[str, Any]]]) -> Callable[..., Any]:
    """The server's function, but that a UserError becomes the prompt's ids."""

    def embed_or_refuse(*inputs: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return embed(*inputs, **options)
        except UserError as problem:
            return RefusedIds(problem), {}

    return embed_or_refuse
