"""Several turns with a model of mlx-vlm's: the tower runs once for the images of a prompt.

All rows are read again in every turn. mlx-vlm looks cached rows up by their ids, of which a pruned
prompt has more than rows, and keeps caches that cannot be cut back (sliding windows, quantized).
"""

from collections.abc import Generator
from typing import Any

from ..generation.request import Request
from ..generation.result import GenerationResponse
from ..inputs.budget import check_budget
from ..machine.bounded_store import BoundedStore
from .clips import check_clip
from .compatibility import check_cache_options, check_pipeline
from .families import host_of
from .families.pruner_defaults import plan_for_host
from .prompt import ImageBudget
from .stream import decoding_arguments, further_ends, processor_options, stream_generate
from .tower_cache import TowerCache
from .views import View


class HostConversation:
    """What a model of mlx-vlm's keeps from turn to turn."""

    rows_reused = 0

    def __init__(
        self, model: Any, processor: Any, store: BoundedStore[list[View]] | None = None
    ) -> None:
        """`store` holds the tower's output for earlier images; without one, of a few prompts."""
        self.model, self.processor = model, processor
        self.host = host_of(model, processor)
        self.towers = TowerCache(self.host, store)

    def clear(self) -> None:
        """Forget all images."""
        self.towers.store.clear()

    def check(self, request: Request) -> None:
        """Raises UserError for a method or an option that the model cannot have."""
        pipeline, options = plan_for_host(self.host, request.pruner), request.given_host_options
        check_pipeline(self.host, pipeline, request.positions)
        if request.video is not None:
            check_clip(self.host, pipeline)
        check_budget(request.keep_ratio, request.keep_tokens)
        decoding_arguments(request)
        further_ends(self.host, request)
        check_cache_options(self.host, pipeline, options)
        processor_options(options)

    def stream(self, request: Request) -> Generator[GenerationResponse, None, None]:
        """The answer to a request with the turns so far as its history. Raises UserError."""
        budget = ImageBudget(request.keep_ratio, request.keep_tokens)
        encode = self.towers.of(plan_for_host(self.host, request.pruner), budget)
        yield from stream_generate(self.model, self.processor, request, encode)
