"""`with pruned(model, …)`: every tool of mlx-vlm's prunes, for as long as the block lasts.

Two things are put on the instance, and taken off again. `get_input_embeddings`, which all tools
call, answers with prompts of which rows are gone (`fewer` says how). And the language model gets
a class of its own, derived from its class, whose call leaves those rows out: Python looks a call
up on the class. No class of mlx-vlm's is touched.

What mlx-vlm keeps between requests it finds by ids, and a pruned prompt has fewer rows than ids.
So inside the block no prefix is read again, and a cache that was filled inside is spent outside.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4
from weakref import WeakSet

from ..checkpoints.errors import UserError
from ..pruners import Pipeline, Pruner, plan
from ..pruners.budget import budget
from ..pruners.contract import Policy
from .embeddings import Embeddings
from .families import host_of
from .fewer import call
from .refusals import check
from .report import Report

SPENT = 1 << 30  # rows that a spent cache claims: more than any prefix that mlx-vlm looks for


@contextmanager
def pruned(
    model: Any,
    pruner: str | Pruner | Pipeline = "divprune",
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: Policy | None = None,
) -> Iterator[Report]:
    """Prune in whatever mlx-vlm does with its `model` inside the block; yields the report of it.

    Of each image's N visual tokens K stay, by `keep_ratio` or `keep_tokens`, half without either;
    `positions` as in `generate`. Answers are to be read to their end inside the block.
    Raises UserError for a model, method or budget that cannot be, and for a model that is being
    pruned already.
    """
    if type(model).__module__.startswith("mlx_vlm_prune."):
        raise UserError("pruned() is for mlx-vlm's models; ours take a pruner in generate()")
    host, pipeline = host_of(model), plan(pruner)
    policy = check(host, pipeline, positions)
    if pipeline.decoder:
        raise UserError(
            f"{pipeline.decoder.name} works between the language model's layers, where a block that"
            " prunes does not reach: call mlx_vlm_prune.generate"
        )
    budget(keep_tokens or 1, keep_ratio, keep_tokens, pipeline)
    report, language = Report(pipeline.name, policy), model.language_model
    embeddings = Embeddings(
        host, model.get_input_embeddings, pipeline, keep_ratio, keep_tokens, policy, report
    )
    kind, caches = type(language), WeakSet[Any]()
    with host.restored():
        model.get_input_embeddings = embeddings
        language.__class__ = _derived(kind, embeddings, _reads_whole(model), caches)
        model.apc_key_dependencies = language.apc_key_dependencies
        try:
            yield report
        finally:
            language.__class__ = kind
            del model.get_input_embeddings, model.apc_key_dependencies
            _spend(caches)


def _reads_whole(model: Any) -> bool:
    """Is a prompt not to be read in pieces, since its rows see those behind them?"""
    policy = getattr(model, "chunked_prefill_policy", None)
    return callable(policy) and not policy()


def _derived(kind: type, embeddings: Embeddings, reads_whole: bool, caches: WeakSet[Any]) -> type:
    """The language model's class for the length of a block."""
    own_index = getattr(kind, "get_rope_index", None)

    def __call__(self: Any, inputs: Any, *more: Any, **told: Any) -> Any:
        if more:
            raise UserError("inside a block that prunes, give the language model's arguments names")
        if told.get("cache"):
            caches.add(told["cache"][0])
        embeddings.busy = True
        try:
            return call(lambda ids, **rest: kind.__call__(self, ids, **rest), reads_whole, inputs,
                        told)  # fmt: skip
        finally:
            embeddings.busy = False

    def get_rope_index(self: Any, *ids: Any, **told: Any) -> Any:
        """mlx-vlm asks for this, too, before it reads a prefix again, and reads the whole prompt
        where it has no answer."""
        if embeddings.busy and own_index:
            return own_index(self, *ids, **told)
        raise UserError("a pruned prompt has fewer rows than ids, so no prefix is read again")

    def chunked_prefill_policy(self: Any, **told: Any) -> bool:
        """A batch is read at once: `fewer` pads it anew, and cuts it itself."""
        cache, x = told.get("prompt_cache"), told.get("inputs_embeds")
        alone = x is None or len(x) == 1
        return alone and not (cache and hasattr(cache[0], "left_padding"))

    def apc_key_dependencies(self: Any) -> tuple[str]:
        """What prefixes in mlx-vlm's automatic cache are found by: never the same twice."""
        return (f"pruned, {uuid4().hex}",)

    own = (__call__, get_rope_index, chunked_prefill_policy, apc_key_dependencies)
    told = {function.__name__: function for function in own}
    held = {} if own_index else {"_position_ids": None}  # who has none is not asked for an index
    return type(kind.__name__, (kind,), {**told, **held, "__module__": kind.__module__})


def _spend(caches: WeakSet[Any]) -> None:
    """A cache of one prompt that was filled inside is of no use outside; mlx-vlm, which would look
    in it for a prefix of ids, starts afresh, and whoever goes on with it is told."""

    def refuse(*_: Any) -> Any:
        raise UserError("this cache was filled inside pruned() and has fewer rows than the prompt"
                        " has ids: read answers to their end inside, and start afresh")  # fmt: skip

    for cache in caches:
        if isinstance(cache.offset, int):
            cache.offset, cache.is_trimmable, cache.update_and_fetch = SPENT, lambda: False, refuse
