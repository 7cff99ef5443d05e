"""`attach`: every tool of mlx-vlm's prunes with a model; `with pruned(model, …)`: for a block.

Two things are put on the instance, and taken off again by `detach`. `get_input_embeddings`, which
all tools call, answers with prompts of which rows are gone (`rows` says how). And the language
model gets a class derived from its class, whose call leaves those rows out: Python looks a call up
on the class. No class of mlx-vlm's is touched, and no weights are needed yet.

What mlx-vlm keeps between requests it finds by ids, and a pruned prompt has fewer rows than ids.
So no prefix is read again, and a cache that was filled before `detach` is spent afterwards.

Shapes: B prompts, L rows of the longest, l rows left of one.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4
from weakref import WeakSet, proxy

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..machine import blas
from ..machine.clock import Clock
from ..models.vlm import VLM
from ..pruners import Pipeline, Pruner, plan
from ..pruners.budget import check_budget
from ..pruners.contract import Policy
from .batch import split_batch
from .compatibility import check_pipeline
from .dropped_rows import BESIDE, call, deepstack_rows, to_full_length
from .families import host_of
from .host import Host
from .prepared_inputs import PreparedInputs
from .prompt import PrunedPrompt, add_text, budgets_by_view, prune_prompt
from .pruning_report import PruningReport
from .tower_cache import TowerCache
from .views import View

UNREAD = ("vision_cache", "_image_key")  # caches of whole features that others would read
OTHERS = ("pixel_values_videos", "input_features", "audio_values")
PREPARED = ("cached_image_features", "inputs_embeds", "position_ids")  # by the caller
OURS = ("position_ids", "rope_deltas", "deepstack_visual_embeds")  # better than what it derives
SPENT = 1 << 30  # rows that a spent cache claims: more than any prefix that mlx-vlm looks for


def attach(
    model: Any,
    pruner: str | Pruner | Pipeline = "divprune",
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: Policy | None = None,
    allow_videos: bool = False,
) -> tuple[PruningReport, Callable[[], None]]:
    """Prune in whatever mlx-vlm does with its `model`; a report of it, and what takes it off.

    Of each image's N visual tokens K stay, by `keep_ratio` or `keep_tokens`, half without either;
    `positions` as in `generate`. With `allow_videos` a prompt with a video or sound is read
    whole, and refused without. Answers are to be read to their end before `detach` is called.
    Raises UserError for a model, method or budget that cannot be, and for a model that is being
    pruned already; then, as after any error, the model is as it was.
    """
    blas.load()  # warns where mlx came first
    host, pipeline, policy = _checked(model, pruner, positions)
    check_budget(keep_ratio, keep_tokens)
    embeddings = PrunedEmbeddings(
        host_of(proxy(model)), pipeline, keep_ratio, keep_tokens, policy, allow_videos,
        _reads_whole(model),
    )  # fmt: skip
    language = model.language_model
    kind = type(language)
    with ExitStack() as undo:
        undo.enter_context(host.preserve_state())
        undo.callback(_spend, embeddings.caches)
        language.__class__ = _shortened(kind, embeddings)
        undo.callback(setattr, language, "__class__", kind)
        model.get_input_embeddings = embeddings
        undo.callback(delattr, model, "get_input_embeddings")
        model.apc_key_dependencies = language.apc_key_dependencies
        undo.callback(delattr, model, "apc_key_dependencies")
        return embeddings.report, undo.pop_all().close


@contextmanager
def pruned(
    model: Any,
    pruner: str | Pruner | Pipeline = "divprune",
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: Policy | None = None,
) -> Iterator[PruningReport]:
    """`attach` for the length of a block, which yields the report."""
    report, detach = attach(
        model, pruner, keep_ratio=keep_ratio, keep_tokens=keep_tokens, positions=positions
    )
    try:
        yield report
    finally:
        detach()


def _checked(
    model: Any, pruner: str | Pruner | Pipeline, positions: Policy | None
) -> tuple[Host, Pipeline, Policy]:
    """The methods, and the position policy that holds; UserError for what cannot be."""
    if isinstance(model, VLM):
        raise UserError(
            "pruned() and attach() are for mlx-vlm's models; ours take a pruner in generate()"
        )
    host, pipeline = host_of(model), plan(pruner)
    policy = check_pipeline(host, pipeline, positions)
    if pipeline.decoder:
        raise UserError(
            f"{pipeline.decoder.name} works between the language model's layers, where a block that"
            " prunes does not reach: call mlx_vlm_prune.generate"
        )
    return host, pipeline, policy


def _reads_whole(model: Any) -> bool:
    """Is a prompt not to be read in pieces, since its rows see those behind them?"""
    policy = getattr(model, "chunked_prefill_policy", None)
    return callable(policy) and not policy()


@dataclass
class PrunedEmbeddings:
    """How a model prunes; called as its `get_input_embeddings` is."""

    host: Host  # of a weak reference to the model, which so goes when its owner lets it go
    pipeline: Pipeline
    keep_ratio: float | None
    keep_tokens: int | None
    policy: Policy
    allow_videos: bool  # are prompts with videos or sound read whole, and not refused?
    reads_whole: bool  # is a prompt not to be read in pieces, since its rows see those behind them?
    busy: bool = False  # are the language model's own functions called from here?
    caches: WeakSet[Any] = field(default_factory=WeakSet)  # the first layer's of each request

    def __post_init__(self) -> None:
        self.report = PruningReport(self.pipeline.spec, self.policy)
        self.tower_cache = TowerCache(self.host, self.pipeline)

    def stock(self, *ids: Any, **extra: Any) -> Any:
        """The model's own `get_input_embeddings`."""
        model = self.host.model
        return model.__class__.get_input_embeddings(model, *ids, **extra)

    def __call__(
        self, input_ids: Any = None, pixel_values: Any = None, mask: Any = None, **extra: Any
    ) -> Any:
        """mlx-vlm's features of B prompts. Raises UserError for what is no image."""
        has_others = any(extra.get(name) is not None for name in OTHERS)
        if has_others and not self.allow_videos:
            raise UserError("only images are pruned: videos and sound go outside the block")
        for name in PREPARED:
            if extra.get(name) is not None:
                raise UserError(f"a model that prunes takes no {name}: which tokens stay is judged"
                                " by the images, and where they stand follows")  # fmt: skip
        extra = {name: value for name, value in extra.items() if name not in UNREAD}
        with self.working():
            if pixel_values is None or has_others:
                return self._whole(self.stock(input_ids, pixel_values, mask=mask, **extra))
            return self._pruned(input_ids, pixel_values, mask, extra)

    @contextmanager
    def working(self) -> Iterator[None]:
        """While the language model's own functions are called from here."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    def _pruned(self, ids_BL: mx.array, pixels: Any, mask_BL: Any, extra: dict[str, Any]) -> Any:
        misses, parts = self.tower_cache.misses, []
        with Clock().running() as clock:
            prompts = split_batch(self.host, ids_BL, mask_BL, pixels, extra, self.tower_cache)
            remembered = self.tower_cache.misses == misses
            for begin, inputs, views in prompts:
                prompt, features = self._prompt(inputs, views)
                if views:
                    self.report.add(prompt, clock.ms, remembered)
                    clock.ms = dict.fromkeys(clock.ms, 0.0)
                parts.append((range(begin, begin + len(inputs.ids)), prompt.kept_rows, features))
        first = parts[0][2]
        if self.host.placeholder_unit != "token":  # mlx-vlm's rows and ids differ there anyway
            return first
        laid = [to_full_length(ids_BL.shape[1], *part, len(self.host.deepstack)) for part in parts]
        batch: dict[str, Any] = dict.fromkeys(BESIDE)
        for name in laid[0]:
            batch[name] = mx.stack([one[name] for one in laid], axis=int(name == "position_ids"))
        if first.rope_deltas is not None:
            batch["rope_deltas"] = mx.concatenate([f.rope_deltas for _, _, f in parts])
        return replace(first, **batch)

    def _prompt(self, inputs: PreparedInputs, views: list[View]) -> tuple[PrunedPrompt, Any]:
        """What stays of a prompt, and mlx-vlm's features of that."""
        if self.keep_tokens is not None and not self.host.knows_images(inputs, views):
            raise UserError(
                f"prompts of a {self.host.kind} model do not say which crops are of"
                " one image: give keep_ratio in place of keep_tokens"
            )
        views = add_text(self.host, inputs, views, self.pipeline)
        budgets = budgets_by_view(views, self.keep_ratio, self.keep_tokens, self.pipeline)
        prompt = prune_prompt(self.host, inputs, views, self.pipeline, budgets, self.policy)
        arguments = dict(prompt.arguments)
        ours = {name: arguments.pop(name) for name in OURS if name in arguments}
        ids_1l, pixels = arguments.pop("input_ids"), arguments.pop("pixel_values", None)
        features = self.stock(ids_1l, pixels, **arguments)
        return prompt, replace(features, **ours, attention_mask_4d=None)  # which nothing reads

    def _whole(self, features: Any) -> Any:
        """Prompts of which nothing goes, laid out as their neighbours in a batch are."""
        if not self.host.deepstack:
            return features
        x_BLD, visual_BL = features.inputs_embeds, features.visual_pos_masks
        if visual_BL is None:
            visual_BL = mx.zeros(x_BLD.shape[:2], mx.bool_)
        deep = features.deepstack_visual_embeds
        deep_RYD = deepstack_rows(visual_BL.flatten(), deep, len(self.host.deepstack), x_BLD)
        deep_BLYD = deep_RYD.reshape(*x_BLD.shape[:2], *deep_RYD.shape[1:])
        return replace(features, visual_pos_masks=visual_BL, deepstack_visual_embeds=deep_BLYD)


class Shortened:
    """Stands before a language model's class: leaves out rows that are gone, finds no prefix."""

    pruning: PrunedEmbeddings

    def __call__(self, inputs: Any, *more: Any, **arguments: Any) -> Any:
        if more:
            raise UserError("while a model prunes, give the language model's arguments names")
        if arguments.get("cache"):
            self.pruning.caches.add(arguments["cache"][0])
        stock: Any = super()
        with self.pruning.working():
            return call(stock.__call__, self.pruning.reads_whole, inputs, arguments)

    def get_rope_index(self, *ids: Any, **arguments: Any) -> Any:
        """mlx-vlm asks for this, too, before it reads a prefix again, and reads the whole prompt
        where it has no answer."""
        stock: Any = super()
        if self.pruning.busy and hasattr(stock, "get_rope_index"):
            return stock.get_rope_index(*ids, **arguments)
        raise UserError("a pruned prompt has fewer rows than ids, so no prefix is read again")

    def chunked_prefill_policy(self, **arguments: Any) -> bool:
        """A batch is read at once: `rows` pads it anew, and cuts it itself."""
        cache, x = arguments.get("prompt_cache"), arguments.get("inputs_embeds")
        alone = x is None or len(x) == 1
        return alone and not (cache and hasattr(cache[0], "left_padding"))

    def apc_key_dependencies(self) -> tuple[str]:
        """What prefixes in mlx-vlm's automatic cache are found by: never the same twice."""
        return (f"pruned, {uuid4().hex}",)


def _shortened(kind: type, pruning: PrunedEmbeddings) -> type:
    """`kind` behind `Shortened`."""
    attributes: dict[str, Any] = {"pruning": pruning, "__module__": kind.__module__}
    if not hasattr(kind, "get_rope_index"):  # who has no positions is not asked for their index
        attributes["_position_ids"] = None
    return type(kind.__name__, (Shortened, kind), attributes)


def _spend(caches: WeakSet[Any]) -> None:
    """A cache of one prompt that was filled inside is of no use outside; mlx-vlm, which would look
    in it for a prefix of ids, starts afresh, and whoever goes on with it is refused."""

    def refuse(*_: Any) -> Any:
        raise UserError("this cache was filled inside pruned() and has fewer rows than the prompt"
                        " has ids: read answers to their end inside, and start afresh")  # fmt: skip

    for cache in caches:
        if isinstance(cache.offset, int):
            cache.offset, cache.is_trimmable, cache.update_and_fetch = SPENT, lambda: False, refuse
