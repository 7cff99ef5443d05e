"""The token loop: sampling, logits processors, a token a step; log-probabilities of given answers.

Shapes: B prompts, A tokens of the longest right answer with its end, V words.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..pruners.numerics import NotFiniteError
from .prefill import Prefill
from .request import LogitsProcessor, Request, Sampler
from .sampling import request_processors, request_sampler

PADDING = -1  # behind a right answer that is shorter than the longest
TokenChooser = Callable[[mx.array], mx.array]  # logits (B, V) to token ids (B, 1)


def generate_step(
    prefill: Prefill, token_B1: mx.array, choose_token: TokenChooser, max_tokens: int
) -> Iterator[mx.array]:
    """The first token of each prompt, which is given, and the next ones, `max_tokens` in all; while
    one is used, the next is computed."""
    for _ in range(max_tokens - 1):
        next_B1 = choose_token(prefill.step(token_B1)[:, -1])
        mx.async_eval(next_B1)
        yield token_B1
        token_B1 = next_B1
    yield token_B1


@contextmanager
def naming_faulty_part(faulty_part: Callable[[], str]) -> Iterator[None]:
    """Where tokens or the first logits inside are not finite, UserError says which part of the
    model gave them, as `faulty_part` finds."""
    try:
        yield
    except NotFiniteError:
        raise UserError(
            f"{faulty_part()} gave NaN or infinite values; try dtype='float32'"
        ) from None


def check_first_logits(logits: mx.array) -> None:
    """Raises NotFiniteError where the first logits (or their logarithms) have NaN: no token of
    theirs means anything."""
    if mx.isnan(logits).any().item():
        raise NotFiniteError("the first logits are NaN; try dtype='float32'")


def first_not_finite(parts: Iterable[tuple[str, mx.array]]) -> str:
    """The name of the first part whose output is not finite; else the language model's."""
    broken = (name for name, x in parts if not mx.isfinite(x).all().item())
    return next(broken, "the language model")


def greedy(logits_BV: mx.array) -> mx.array:
    """The likeliest tokens, (B, 1)."""
    return mx.argmax(logits_BV, axis=-1, keepdims=True)


def process_logits(processor: LogitsProcessor, tokens_L: mx.array, logits_1V: mx.array) -> mx.array:
    """A user's processor, called. Raises UserError where it returns no logits (1, V)."""
    logits = processor(tokens_L, logits_1V)
    if not isinstance(logits, mx.array) or logits.shape != logits_1V.shape:
        shape = f"shape {logits.shape}" if isinstance(logits, mx.array) else repr(logits)
        raise UserError(
            f"a logits processor returned {shape}; it must be logits of shape {logits_1V.shape}"
        )
    return logits


def sample_token(sampler: Sampler, logprobs_1V: mx.array) -> mx.array:
    """A user's sampler, called: a token id (1,). Raises UserError where it returns none."""
    token = sampler(logprobs_1V)
    is_id = isinstance(token, mx.array) and mx.issubdtype(token.dtype, mx.integer)
    if not is_id or token.size != 1:
        raise UserError(f"the sampler returned {token!r}; it must be one token id (1,)")
    return token.reshape(1)


class PromptChooser:
    """Chooses one prompt's tokens: logits processors first, then the sampler, as mlx-lm does.

    `ids` are the prompt's token ids, with which the processors' tokens begin.
    """

    def __init__(self, request: Request, ids: Sequence[int]) -> None:
        self.processors = request_processors(request)
        self.sampler = request_sampler(request)
        self.tokens_L = mx.array(list(ids))
        self.is_greedy = not (self.processors or self.sampler)

    def __call__(self, logits_1V: mx.array) -> mx.array:
        """A token id (1, 1). Raises UserError where a sampler returns anything else."""
        for processor in self.processors:
            logits_1V = process_logits(processor, self.tokens_L, logits_1V)
        if self.sampler is None:
            token_11 = greedy(logits_1V)
        else:
            logprobs_1V = logits_1V - mx.logsumexp(logits_1V, axis=-1, keepdims=True)
            token_11 = sample_token(self.sampler, logprobs_1V)[None]
        if self.processors:
            self.tokens_L = mx.concatenate([self.tokens_L, token_11[0].astype(mx.int32)])
        return token_11


def make_chooser(request: Request, prompts: Sequence[Sequence[int]]) -> TokenChooser:
    """What chooses the next tokens of prompts, given as ids. Each draws by itself, so that its
    answer does not depend on its neighbours."""
    choosers = [PromptChooser(request, ids) for ids in prompts]
    if all(choose.is_greedy for choose in choosers):
        return greedy
    return lambda logits_BV: mx.concatenate(
        [choose(logits_BV[b : b + 1]) for b, choose in enumerate(choosers)]
    )


def greedy_answers(prefill: Prefill, ends: Collection[int], max_tokens: int) -> list[list[int]]:
    """Each prompt's answer without the token that ended it, `max_tokens` at most."""
    steps = generate_step(prefill, greedy(prefill.logits_BV), greedy, max_tokens)
    return collect_answers(steps, len(prefill.rows), ends)


def collect_answers(
    steps: Iterator[mx.array], prompts: int, ends: Collection[int]
) -> list[list[int]]:
    """Each prompt's answer without the token that ended it, from `generate_step`'s tokens."""
    answers: list[list[int]] = [[] for _ in range(prompts)]
    running = set(range(prompts))
    for token_B1 in steps:
        tokens = np.array(token_B1)[:, 0].tolist()
        running -= {b for b in running if tokens[b] in ends}
        if not running:
            break
        for b in running:
            answers[b].append(tokens[b])
    return answers


def likelihood(prefill: Prefill, right_BA: np.ndarray) -> np.ndarray:
    """Log-probabilities (B,) of answers with their ends: the sums over their tokens.

    -1 pads. Raises UserError where the model gives none.
    """
    logprob_B: np.ndarray = token_logprobs(prefill, right_BA).sum(axis=1)
    return logprob_B


def token_logprobs(prefill: Prefill, right_BA: np.ndarray) -> np.ndarray:
    """Log-probabilities (B, A) of the tokens of answers, in nats; 0 where -1 pads.

    The prefill stays as it is. Raises UserError where the model gives none.
    """
    right = mx.array(np.maximum(right_BA, 0))
    logits_BAV = prefill.logits_BV[:, None]
    if right_BA.shape[1] > 1:
        after_BAV = prefill.fork().step(right[:, :-1])
        logits_BAV = mx.concatenate([logits_BAV, after_BAV], axis=1)
    logits_BAV = logits_BAV.astype(mx.float32)
    right_logit_BA = mx.take_along_axis(logits_BAV, right[..., None], axis=-1)[..., 0]
    logprob_BA = np.array(right_logit_BA - mx.logsumexp(logits_BAV, axis=-1)).astype(np.float64)
    logprob_BA = np.where(right_BA != PADDING, logprob_BA, 0)
    if not np.isfinite(logprob_BA).all():
        raise UserError("the language model gave NaN or infinite odds; try dtype='float32'")
    return logprob_BA
