"""Which methods are swept at which budgets in a model, which it refuses, and their operations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoints.errors import UserError
from ..hosts.compatibility import check_pipeline
from ..hosts.families import host_of
from ..hosts.families.pruner_defaults import plan_for_host
from ..hosts.host import Host
from ..inputs.budget import tokens_for
from ..models.vlm import VLM
from ..planning import operations
from ..planning.host_operations import language_sizes
from ..planning.operations import Operations
from ..pruners import AUTO, Pipeline, plan
from ..pruners.contract import Policy
from .budgeted_methods import BudgetedMethod, chooser, why_not_trained
from .sweep_run import Measurement

Refusal = dict[str, Any]  # a method, its budget, and why


@dataclass(frozen=True)
class SweptVLM:
    """One of our models, whose images all have N visual tokens."""

    model: VLM
    processor: Any = None
    counted = "the tower, projector and language model"

    @property
    def N(self) -> int:
        return self.model.N

    def plan(self, spec: str) -> Pipeline:
        """Raises UserError for a method that the model cannot do."""
        pipeline = plan(spec, self.model.learned)
        pipeline.signal_layers(self.model.config.vision.depth)
        return pipeline

    def check(self, case: BudgetedMethod) -> None:
        """Raises UserError for a budget that the method cannot keep."""
        self._count(case, text=1)

    def operations(
        self, case: BudgetedMethod, full: Measurement, pruned: Measurement
    ) -> dict[str, int] | None:
        """Multiply-adds of an answer, by part."""
        counted = self._count(case, full.text_tokens)
        parts = ("vision", "projector", "prefill", "decode", "first_token")
        return {part: getattr(counted, part) for part in parts}

    def _count(self, case: BudgetedMethod, text: int) -> Operations:
        return operations.count(self.model.config, text, case.pipeline, int(case.K))


class SweptHost:
    """A model of mlx-vlm's, whose images differ in N. Its tower's operations are not counted."""

    counted = "the language model"
    N = None

    def __init__(self, host: Host):
        self.host, self.sizes = host, language_sizes(host)
        self.model, self.processor = host.model, host.processor

    def plan(self, spec: str) -> Pipeline:
        """Raises UserError for a method that the model cannot do."""
        return plan_for_host(self.host, spec)

    def check(self, case: BudgetedMethod) -> None:
        """Raises UserError for a method or a policy of positions that the model cannot have.

        Whether a budget can be kept depends on the image.
        """
        check_pipeline(self.host, case.pipeline, case.pipeline.policy)

    def operations(
        self, case: BudgetedMethod, full: Measurement, pruned: Measurement
    ) -> dict[str, int] | None:
        """Multiply-adds of the language model; None where they cannot be counted."""
        if self.sizes is None:
            return None
        rows = [full.text_tokens + visual for visual in pruned.layers]
        prefill = operations.prefill(self.sizes, rows)
        decode = operations.decode(self.sizes, [S + 1 for S in rows])
        return {"prefill": prefill, "decode": decode, "first_token": prefill}


SweptModel = SweptVLM | SweptHost


def swept_model(model: Any, processor: Any) -> SweptModel:
    if isinstance(model, VLM):
        return SweptVLM(model, processor)
    return SweptHost(host_of(model, processor))


def full_case(model: SweptModel) -> BudgetedMethod:
    """All visual tokens."""
    return BudgetedMethod("none", model.N or 1.0, model.plan("none"))


def sweep_cases(
    model: SweptModel, specs: Iterable[str], budgets: Sequence[float],
    policies: Sequence[Policy | None],
) -> tuple[list[BudgetedMethod], list[Refusal]]:  # fmt: skip
    """Every method at every budget, and those that the model refuses.

    Raises UserError where it refuses all.
    """
    cases: list[BudgetedMethod] = []
    refused: list[Refusal] = []
    choose = chooser(model.model, model.processor)
    for spec in dict.fromkeys(specs):
        try:
            planned = {K: model.plan(choose(K) if spec == AUTO else spec) for K in budgets}
        except UserError as e:
            refused.append({"pruner": spec, "why": str(e)})
            continue
        for K, pipeline in planned.items():
            for policy in policies:
                case = BudgetedMethod(spec, K, replace(pipeline, policy=policy))
                if why := _why_not(model, case):
                    refused.append({"pruner": spec, "tokens": K, "why": why})
                else:
                    cases.append(case)
    if not cases:
        raise UserError(refused[0]["why"])
    return sorted(cases, key=lambda case: -case.K), _joined(refused)


def _why_not(model: SweptModel, case: BudgetedMethod) -> str | None:
    try:
        model.check(case)
    except UserError as e:
        return str(e)
    return why_not_trained(case.pipeline, case.K, model.N)


def _joined(refused: list[Refusal]) -> list[Refusal]:
    """One refusal for a reason that holds at all budgets."""
    distinct: dict[tuple[str, str], Refusal] = {}
    for refusal in refused:
        known = distinct.setdefault((refusal["pruner"], refusal["why"]), dict(refusal))
        if known.get("tokens") != refusal.get("tokens"):
            known.pop("tokens", None)
    return [*distinct.values()]


def budgets_of(
    N: int | None, keep_ratios: Sequence[float], keep_tokens: Sequence[int]
) -> list[float]:
    """The budgets, the largest first: as tokens of N, or where images differ in N as shares."""
    counts = [min(K, N or K) for K in keep_tokens]
    shares = [tokens_for(N, ratio) if N else float(ratio) for ratio in keep_ratios]
    return sorted({*counts, *shares}, reverse=True)
