"""Methods that made one and the same choice at a budget, by what the model then answered.

Without a CLS token in the tower, for example, `cls_attention` is `received_attention`.

Shapes: P methods with their budgets, Q questions.
"""

from collections.abc import Sequence
from typing import Any

from .budgeted_methods import BudgetedMethod
from .judge import AnswerTable


def alike_methods(
    methods: Sequence[BudgetedMethod], answers: AnswerTable, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Groups of `pruners` with the `tokens` at which they are alike.

    Alike: all responses and the right answers' probabilities are the same to the last digit, and
    not those with all tokens. `sizes` are the tokens of each question's images.
    """
    contents = [
        (answers.logprob_PQ[p].tobytes(), tuple(responses))
        for p, responses in enumerate(answers.responses_PQ)
    ]
    names: dict[tuple[float, Any], list[str]] = {}
    for method, content in zip(methods, contents, strict=True):
        if content != contents[0]:
            name = " ".join([method.spec, *filter(None, [method.pipeline.policy])])
            names.setdefault((method.K, content), []).append(name)
    tokens: dict[tuple[str, ...], list[int]] = {}
    for (K, _), group in names.items():
        if len(group) > 1:
            at_K = next(method for method in methods if method.K == K)
            tokens.setdefault(tuple(group), []).append(at_K.mean_tokens(sizes))
    return [{"pruners": [*group], "tokens": at} for group, at in tokens.items()]
