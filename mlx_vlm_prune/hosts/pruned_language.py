"""The mixin of a pruned language model: it drops rows in its call, and finds no prefix in caches.

mlx-vlm finds in its caches by ids what it has read before, and a pruned prompt has fewer rows than
ids. So while a model prunes no prefix is read from a cache, and caches that were filled then are
unusable afterwards.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary, ref

import mlx.core as mx

from ..checkpoints.errors import UserError
from .dropped_rows import EMBEDDINGS, IS_READ, ReadColumns, call_on_kept_rows, rows_cache
from .host import REQUEST_STATE
from .prefill import check_not_through_cuts, last_row_call
from .prompt import PrunedPrompt

UNUSABLE = 1 << 30  # rows that an unusable cache claims: no prefix that mlx-vlm looks for has them


@dataclass
class LanguageState:
    """What a pruned model's embeddings share with its language model."""

    is_bidirectional: bool
    mask_layers: Sequence[int] = ()  # with an enhancer: those whose caches make masks
    reads_through_cuts: bool = False  # with a method between the language model's layers
    gives_rope_index: bool = False  # see `PrunedLanguage.get_rope_index`
    # of prompts that were read through cuts weak references to their `attention_mask`
    through_cuts: list[tuple[Any, PrunedPrompt]] = field(default_factory=list)
    # of each request the first cache that holds rows, and what was read into it
    caches: WeakKeyDictionary[Any, ReadColumns] = field(default_factory=WeakKeyDictionary)

    @contextmanager
    def giving_rope_index(self) -> Iterator[None]:
        self.gives_rope_index = True
        try:
            yield
        finally:
            self.gives_rope_index = False

    def add_prompt(self, is_read_BL: mx.array, prompt: PrunedPrompt) -> None:
        """Note a prompt that was read through cuts; it is forgotten with its mask."""
        pairs = self.through_cuts

        def forget(mask: Any) -> None:
            pairs[:] = [pair for pair in pairs if pair[0] is not mask]

        pairs.append((ref(is_read_BL, forget), prompt))

    def prompt_of(self, arguments: dict[str, Any]) -> PrunedPrompt | None:
        """The prompt that a call is for, if it was read through cuts."""
        is_read_BL = arguments.get(IS_READ)
        if is_read_BL is None or arguments.get(EMBEDDINGS) is None:
            return None
        pairs = [*self.through_cuts]
        return next((prompt for mask, prompt in pairs if mask() is is_read_BL), None)

    def columns_read(self, cache: Any, is_read_BL: mx.array | None) -> ReadColumns:
        """What was read of the prompt with this mask into a request's caches."""
        mask: Any = (lambda: None) if is_read_BL is None else ref(is_read_BL)
        if not cache:
            return ReadColumns(mask, self.mask_layers)
        first = rows_cache(cache)
        read = self.caches.get(first)
        if read is None or (is_read_BL is not None and read.mask() is not is_read_BL):
            read = self.caches[first] = ReadColumns(mask, self.mask_layers)
        return read

    def invalidate_caches(self) -> None:
        """Make the caches of single prompts unusable: mlx-vlm, which looks in them for a prefix of
        ids, starts afresh, and whoever goes on with one gets UserError."""

        def refuse(*_: Any) -> Any:
            raise UserError(
                "this cache was filled inside pruned() and has fewer rows than the prompt has ids:"
                " read answers to their end inside, and start afresh"
            )

        for cache in self.caches:
            if isinstance(cache.offset, int):
                cache.offset, cache.is_trimmable = UNUSABLE, lambda: False
                cache.update_and_fetch = refuse


class PrunedLanguage:
    """Mixin before a language model's class."""

    state: LanguageState

    def __call__(self, inputs: Any, *more: Any, **arguments: Any) -> Any:
        if more:
            raise UserError("while a model prunes, give the language model's arguments names")
        if prompt := self.state.prompt_of(arguments):
            inputs, arguments = last_row_call(prompt, arguments)
        elif self.state.reads_through_cuts:
            check_not_through_cuts(arguments.get(EMBEDDINGS))
        read = self.state.columns_read(arguments.get("cache"), arguments.get(IS_READ))
        stock: Any = super()
        if arguments.get("inputs_embeds") is None:  # another request may have come in between
            for name, value in read.request_state.items():
                setattr(self, name, value)
        with self.state.giving_rope_index():
            bidirectional = self.state.is_bidirectional
            answer = call_on_kept_rows(stock.__call__, bidirectional, inputs, arguments, read)
        module: Any = self  # whose arrays are items, and all else attributes
        names = {*vars(self), *module} & {*REQUEST_STATE}
        read.request_state = {name: getattr(self, name) for name in names}
        return answer

    def get_rope_index(self, *ids: Any, **arguments: Any) -> Any:
        """Positions for calls from here. mlx-vlm calls this as well before it reads a prefix from a
        cache, and where that raises it reads the whole prompt."""
        stock: Any = super()
        if self.state.gives_rope_index and hasattr(stock, "get_rope_index"):
            return stock.get_rope_index(*ids, **arguments)
        raise UserError("a pruned prompt has fewer rows than ids, so no prefix is read again")

    def chunked_prefill_policy(self, **arguments: Any) -> bool:
        """May mlx-vlm read the prompt in pieces? Not a batch: `call_on_kept_rows` repads it, and
        reads that in pieces."""
        cache, x = arguments.get("prompt_cache"), arguments.get("inputs_embeds")
        is_alone = x is None or len(x) == 1
        has_batch_cache = cache and hasattr(rows_cache(cache), "left_padding")
        call = {**(arguments.get("prefill_kwargs") or {}), EMBEDDINGS: x}
        is_whole = self.state.is_bidirectional or self.state.prompt_of(call)
        return is_alone and not (has_batch_cache or is_whole)

    def apc_key_dependencies(self) -> tuple[str]:
        """Part of the key of a prefix in mlx-vlm's automatic cache: never the same twice."""
        return (f"pruned, {uuid4().hex}",)


def pruned_class(base: type, state: LanguageState) -> type:
    """A language model's class `base` behind the mixin, by the same name."""
    attributes: dict[str, Any] = {"state": state, "__module__": base.__module__}
    if not hasattr(base, "get_rope_index"):  # mlx-vlm asks only models that have one of these two
        attributes["_position_ids"] = None
    return type(base.__name__, (PrunedLanguage, base), attributes)


@contextmanager
def stock_language(language: Any) -> Iterator[None]:
    """Inside the block a pruned language model is mlx-vlm's own, for prompts that come as they are
    read; answers that are being written must wait."""
    pruned = type(language)
    if issubclass(pruned, PrunedLanguage):
        language.__class__ = pruned.__bases__[1]
    try:
        yield
    finally:
        language.__class__ = pruned
