"""`attach` makes every tool of mlx-vlm's prune with a model; `with pruned(model, …)` for a block.

Two things are put on the instance, and taken off again by `detach`: a `get_input_embeddings`, which
all tools call, that marks dropped rows (see `dropped_rows`), and a class for the language model,
derived from its own, whose call leaves them out. It must be a class, since Python looks `__call__`
up there. No class of mlx-vlm's is changed, and no weights are needed yet.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import proxy

from ..checkpoints.errors import UserError
from ..inputs.budget import check_budget
from ..machine import blas
from ..models.vlm import VLM
from ..pruners import AUTO, Pipeline, Pruner
from ..pruners.contract import Policy
from .auto import choose_method
from .compatibility import check_pipeline
from .families import host_of
from .families.pruner_defaults import plan_for_host
from .host import Host
from .input_embeddings import PrunedEmbeddings
from .llava_processor import LLAVA, is_unmended, mend
from .pruned_language import LanguageState, pruned_class
from .pruning_report import PruningReport
from .served import ServerGuard


def attach(
    model: Any,
    pruner: str | Pruner | Pipeline = AUTO,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: Policy | None = None,
    allow_videos: bool = False,
    processor: Any = None,
) -> tuple[PruningReport, Callable[[], None]]:
    """Prune in whatever mlx-vlm does with its `model`, until the returned `detach` is called.

    Of each image's N visual tokens K stay, by `keep_ratio` or `keep_tokens`, half without either;
    "auto" chooses a method, and the report's `auto` says why; `positions` as in `generate`. With
    `allow_videos` a prompt with sound, or a video that cannot be pruned, is read unpruned; without,
    it is refused. `processor` is mlx-vlm's own of the model, or the folder that mlx-vlm will load
    it from: a LLaVA's works with transformers 5.20 and later only where it is given. A method
    between the language model's layers prunes prompts that are read alone, in no batch and not in
    mlx-vlm's server. Read answers to their end before `detach` is called. Raises UserError for a
    model, method or budget that cannot be, and for a model that is being pruned already; then, as
    after any error, the model is as it was.
    """
    blas.load()  # warns where mlx came first
    pruner, budget, why = _resolved(model, pruner, keep_ratio, keep_tokens)
    host, pipeline, policy = _checked_host(model, pruner, positions)
    mask_layers = host.mask_layers if pipeline.enhancer else ()
    state = LanguageState(host.is_bidirectional, mask_layers, bool(pipeline.decoder))
    guard = ServerGuard(model)
    host.model = proxy(model)  # weak: the model, which will hold it, is freed with its last owner
    embeddings = PrunedEmbeddings(host, pipeline, *budget, policy, allow_videos, state)
    embeddings.guard, embeddings.report.auto = guard, why
    with ExitStack() as undo:
        if processor is not None and host.kind == LLAVA:
            undo.callback(mend(processor))
        undo.callback(guard.release)
        guard.watch()
        undo.enter_context(host.preserve_state())
        undo.callback(state.invalidate_caches)
        _put_on(model, embeddings, undo)
        return embeddings.report, undo.pop_all().close


def _put_on(model: Any, embeddings: PrunedEmbeddings, undo: ExitStack) -> None:
    language, base = model.language_model, type(model.language_model)
    language.__class__ = pruned_class(base, embeddings.state)
    undo.callback(setattr, language, "__class__", base)
    model.get_input_embeddings = embeddings
    undo.callback(delattr, model, "get_input_embeddings")
    model.apc_key_dependencies = language.apc_key_dependencies
    undo.callback(delattr, model, "apc_key_dependencies")


def _resolved(
    model: Any, pruner: str | Pruner | Pipeline, keep_ratio: float | None, keep_tokens: int | None
) -> tuple[str | Pruner | Pipeline, tuple[float | None, int | None], str | None]:
    """A method in place of `auto`, its budget, and why it was chosen. Raises UserError."""
    check_budget(keep_ratio, keep_tokens)
    if pruner != AUTO or isinstance(model, VLM):
        return pruner, (keep_ratio, keep_tokens), None
    choice = choose_method(model, None, keep_ratio, keep_tokens, is_batched=True)
    return choice.pruner, (choice.keep_ratio, choice.keep_tokens), choice.line


def _checked_host(
    model: Any, pruner: str | Pruner | Pipeline, positions: Policy | None
) -> tuple[Host, Pipeline, Policy]:
    """The model's host, the methods and the position policy that holds.

    Raises UserError for what cannot be pruned here.
    """
    if isinstance(model, VLM):
        raise UserError(
            "pruned() and attach() are for mlx-vlm's models; ours take a pruner in generate()"
        )
    host = host_of(model)
    pipeline = plan_for_host(host, pruner)
    policy = check_pipeline(host, pipeline, positions)
    return host, pipeline, policy


@contextmanager
def pruned(
    model: Any,
    pruner: str | Pruner | Pipeline = AUTO,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    positions: Policy | None = None,
    processor: Any = None,
) -> Iterator[PruningReport]:
    """`attach` for the length of a block, which yields the report.

    Where mlx-vlm's processor of a LLaVA fails inside, since it was not given, UserError says so.
    """
    budget: dict[str, Any] = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
    report, detach = attach(model, pruner, **budget, positions=positions, processor=processor)
    try:
        yield report
    except (TypeError, ValueError) as problem:
        if processor is None and model.config.model_type == LLAVA and is_unmended(problem):
            raise UserError(
                "mlx-vlm's processor of LLaVA fails with this release of transformers; give it to"
                " the block, pruned(model, …, processor=processor), which mends it"
            ) from problem
        raise
    finally:
        detach()
