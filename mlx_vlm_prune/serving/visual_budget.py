"""How many visual tokens a request keeps: what it says, else the command line, else the model."""

from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoints.errors import UserError, short
from ..inputs.budget import check_budget
from .refusals import RequestRefusedError, in_api_words
from .request_schema import ChatBody, Detail
from .settings import ServerSettings

MIXED_DETAILS = (
    "the pictures have different details, and a request has one budget: all are read as with"
    " detail {}"
)
LOW_WITHOUT_METHOD = "detail low needs a pruner other than none: all visual tokens are kept"
HIGH_WITHOUT_METHOD = "detail high keeps all visual tokens: the pruner {} was not used"


@dataclass(frozen=True)
class VisualBudget:
    """A method, and what each image keeps; with `budget_ms` K is chosen when the prompt is known.

    With `low_detail` an image keeps 64 tokens or a ninth, whichever is more.
    """

    pruner: str = "none"
    keep_ratio: float | None = None
    keep_tokens: int | None = None
    low_detail: bool = False
    budget_ms: float | None = None


def visual_budget(
    body: ChatBody, details: Sequence[Detail | None], settings: ServerSettings
) -> tuple[VisualBudget, list[str]]:
    """The budget of a request with pictures of these details, and what of it cannot be met.

    An explicit budget comes before `detail`, `detail: low` and `high` before the server's default.
    Raises RequestRefusedError for budgets that contradict each other.
    """
    budget = explicit_budget(body, settings)
    if budget:
        return budget, []
    given = {detail or "auto" for detail in details}
    detail = next((name for name in ("high", "auto", "low") if name in given), "auto")
    warnings = [MIXED_DETAILS.format(detail)] if len(given) > 1 else []
    method = body.pruner or settings.method
    if detail == "high":
        if body.pruner not in (None, "none"):
            warnings.append(HIGH_WITHOUT_METHOD.format(short(body.pruner)))
        return VisualBudget(), warnings
    if detail == "auto":
        return default_budget(body, settings), warnings
    if method == "none":
        return VisualBudget(), [LOW_WITHOUT_METHOD]
    return VisualBudget(method, low_detail=True), warnings


def explicit_budget(body: ChatBody, settings: ServerSettings) -> VisualBudget | None:
    """The budget that a request names itself."""
    fields = {
        "visual_tokens": body.visual_tokens,
        "keep_ratio": body.keep_ratio,
        "budget_ms": body.budget_ms,
    }
    given = [name for name, value in fields.items() if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise RequestRefusedError(f"give one of {' and '.join(given)}", field=given[1])
    try:
        check_budget(body.keep_ratio, body.visual_tokens)
    except UserError as problem:
        raise RequestRefusedError(in_api_words(str(problem)), field=given[0]) from None
    if body.budget_ms is not None and not 0 < body.budget_ms < float("inf"):
        raise RequestRefusedError(
            f"budget_ms is {body.budget_ms}; it must be a number above 0", field="budget_ms"
        )
    method = body.pruner or settings.method
    if method == "none" and body.keep_ratio != 1:
        raise RequestRefusedError(
            f"{given[0]} needs a pruner other than none, for example divprune", field="pruner"
        )
    return VisualBudget(
        method, body.keep_ratio, body.visual_tokens, budget_ms=body.budget_ms
    )  # fmt: skip


def default_budget(body: ChatBody, settings: ServerSettings) -> VisualBudget:
    """The server's own budget, by the request's method if it names one."""
    method = body.pruner or (settings.method if settings.is_pruning else "none")
    if method == "none":
        return VisualBudget()
    return VisualBudget(
        method, settings.keep_ratio, settings.keep_tokens, budget_ms=settings.budget_ms
    )
