"""Which methods are evaluated at which budgets."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..hosts.auto import choose_method
from ..inputs.budget import tokens_for
from ..models.vlm import VLM
from ..pruners import AUTO, METHODS, Pipeline, Stage, plan
from ..pruners.auto import choose_for_clip
from ..pruners.contract import Policy

CHAINS = (
    "cls_attention+fastv", "visionzip+pyramiddrop", "tome+divprune",
    "ipcv:least,share=0.34+divprune+restore",
)  # fmt: skip
POOLING = ("avgpool", "attention_pool")  # their slots replace no tokens, so nothing is to restore


@dataclass(frozen=True)
class BudgetedMethod:
    """A method with its budget: one row of the result."""

    spec: str
    K: float  # an int: tokens of each image; a float: the share of an image's tokens
    pipeline: Pipeline  # of `auto`, what it chose

    def mean_tokens(self, sizes: Sequence[int]) -> int:
        """The tokens kept of an image, on average over images of `sizes` tokens."""
        if isinstance(self.K, int):
            return round(sum(min(self.K, N) for N in sizes) / len(sizes))
        return round(sum(tokens_for(N, self.K) for N in sizes) / len(sizes))

    def columns(self, sizes: Sequence[int]) -> dict[str, Any]:
        """The first columns of the row; `sizes` are the tokens of each question's images."""
        tokens = self.mean_tokens(sizes)
        columns = {"pruner": self.spec, "tokens": tokens, "of": round(sum(sizes) / len(sizes))}
        if self.spec == AUTO:
            columns["chosen"] = self.pipeline.spec
        if self.pipeline.policy:
            columns["positions"] = self.pipeline.policy
        if not isinstance(self.K, int):
            return {**columns, "keep_ratio": self.K}
        return columns if tokens == self.K else {**columns, "keep_tokens": self.K}


def budgeted_methods(
    N: int | None,
    specs: Sequence[str],
    budgets: Sequence[float],
    learned: Mapping[str, Any],
    policies: Sequence[Policy | None] = (None,),
    choose: Callable[[float], str] | None = None,
    why_not: Callable[[Pipeline], str | None] = lambda pipeline: None,
) -> tuple[list[BudgetedMethod], list[dict]]:
    """Full, then at every budget `random` and the others; and those refused, with the reason.

    `N` is the number of every image's tokens, or None where images differ. With several policies
    of positions a method is there once with each. `choose` names the method of `auto` for a
    budget. `why_not` says why a method cannot be asked, if so. Raises UserError for an unknown
    method.
    """
    methods, refused = [BudgetedMethod("none", N or 1.0, plan("none"))], []
    for K in budgets:
        for spec in dict.fromkeys(["random", *specs]):
            pipeline = plan(choose(K) if choose and spec == AUTO else spec, learned)
            if why := why_not_trained(pipeline, K, N) or why_not(pipeline):
                refused.append({"pruner": spec, "tokens": K, "why": why})
            elif spec != "none":
                methods += [
                    BudgetedMethod(spec, K, replace(pipeline, policy=policy)) for policy in policies
                ]
    return methods, refused


def chooser(model: Any, processor: Any, *, with_clips: bool = False) -> Callable[[float], str]:
    """What `auto` chooses for a budget, tokens (an int) or a share (a float), of pictures or of
    clips. It keeps just that, whatever the question, so that rows compare."""

    def choose(K: float) -> str:
        ratio, tokens = (None, K) if isinstance(K, int) else (K, None)
        if with_clips:
            return choose_for_clip(ratio, tokens).pruner
        return choose_method(model, processor, ratio, tokens, is_timed=False).pruner

    return choose


def why_not_trained(pipeline: Pipeline, K: float, N: int | None) -> str | None:
    """Why a method cannot keep K of N tokens, if its training or its options say another number."""
    if N is not None and N != K and (fixed := pipeline.own_budget(N)) not in (None, K):
        return f"its options say how many go on: {fixed} in the average layer"
    if pipeline.trained_tokens in (None, K) or N == K:
        return None
    return f"it was trained for {pipeline.trained_tokens} tokens"


def random_baselines(methods: Sequence[BudgetedMethod]) -> list[int | None]:
    """For each method the number of `random` with the same budget and policy of positions; None
    for full and `random`."""
    settings = [(method.K, method.pipeline.policy) for method in methods]
    random = {settings[p]: p for p, method in enumerate(methods) if method.spec == "random"}
    return [
        None if method.spec in ("none", "random") else random.get(setting)
        for method, setting in zip(methods, settings, strict=True)
    ]


def default_methods(model: VLM) -> list[str]:
    """All methods that one of our models supports, with their papers' options, selectors with
    `restore` too, and some chains."""
    supported = [
        name
        for name, method in METHODS.items()
        if method.stage is not Stage.ENHANCER and (not method.learned or name in model.learned)
    ]
    dynamic = ["mlp:dynamic"] if "mlp" in model.learned else []
    return [*supported, *dynamic, *with_restore(supported), *CHAINS]


def with_restore(names: Sequence[str]) -> list[str]:
    """Those by which tokens leave ahead of the language model, each with `restore`."""
    selectors = (Stage.ENCODER, Stage.FEATURES, Stage.PROJECTED)
    chosen = [name for name in names if METHODS[name].stage in selectors]
    return [f"{name}+restore" for name in chosen if name not in ("none", *POOLING)]
