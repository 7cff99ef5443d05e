"""Speculative decoding: a twig drafts several tokens, one pass of the model accepts or rejects.

TwigVLM, Shao et al., ICCV 2025, arXiv:2503.14075, its self-speculative decoding. The model's first
K layers and the twig that grows on them draft the next tokens, each the most likely; a draft ends
after a token that the twig gives less than 0.6, after the end of the answer, or after N. The layers
from K on then read the drafted hidden states in one pass, and of the draft stays what the model
itself would have said, with the word that it says next. So the answer is that of greedy decoding;
where two words are equally likely to the last bits, a sum taken over several rows at once may
decide otherwise than one over a single row.

Rows of the first K layers serve draft and judgement. What was drafted in vain leaves all caches,
whose layers may hold different numbers of rows; the twig's are never pruned.

Differs from the authors' code: the model reads the prompt and says the first word before anything
is drafted, so that it comes no later; theirs drafts first, which saves one pass. Any method
may have pruned, or none.

Shapes: B prompts (1 here), n drafted tokens, L rows, D features, V words.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..checkpoints.errors import UserError
from ..models.layers import TwigReader
from ..models.vlm import VLM, Prefill

MIN_PROBABILITY = 0.6  # TwigVLM's; a draft ends behind what the twig thinks less likely


def check_num_draft_tokens(
    num_draft_tokens: int | None, temperature: float, has_twigs: bool
) -> None:
    """Raises UserError for a number of drafted tokens that the answer or the model cannot have."""
    if num_draft_tokens is None:
        return
    if num_draft_tokens < 1:
        raise UserError(f"num_draft_tokens is {num_draft_tokens}; it must be at least 1")
    if temperature:
        raise UserError(
            f"num_draft_tokens is for greedy answers, and temperature is {temperature}; leave one"
            " out"
        )
    if not has_twigs:
        raise UserError(
            "num_draft_tokens needs a twig, and a model of mlx-vlm's has none; leave it out"
        )


def twig_of(model: VLM, name: str) -> TwigReader:
    """The twig beside a model, which has read nothing yet. Raises UserError without one."""
    if twig := model.learned.get("twig"):
        return TwigReader(twig)
    raise UserError(
        f"num_draft_tokens needs a twig, and {name} has none beside it;"
        " mlx-vlm-prune convert to-mlx --twig brings one along,"
        " mlx-vlm-prune train with stage twig trains one"
    )


class Token(NamedTuple):
    """A token of an answer, the tokens drafted and accepted so far (None without a twig), and
    whether it is a drafted one."""

    id: int
    drafted: int | None = None
    accepted: int | None = None
    from_draft: bool = False


class Speculation:
    """Greedy decoding of one prompt that was read, up to `max_draft` drafted tokens a turn.

    `reader` is the twig with its rows of the prompt; a draft ends behind a token of `ends`.
    """

    def __init__(
        self, prefill: Prefill, reader: TwigReader, ends: Collection[int], max_draft: int,
        min_probability: float = MIN_PROBABILITY,
    ):  # fmt: skip
        self.prefill, self.reader, self.twig = prefill, reader, reader.twig
        self.ends, self.max_draft, self.min_probability = ends, max_draft, min_probability

    def tokens(self, token: int, limit: int) -> Iterator[Token]:
        """The first token, which the prompt gave, and the next ones: `limit` in all, unless the
        caller stops. When a turn's tokens come, its rows are cropped."""
        position_11, drafted, accepted = self.prefill.next_B1, 0, 0
        yield Token(token, 0, 0)
        left = limit - 1
        while left:
            draft, states_1LD = self.draft(token, position_11, min(self.max_draft, left - 1))
            verified = self.verify(states_1LD, position_11)
            right = count_accepted(draft, verified)
            self.crop(len(draft) - right)
            drafted, accepted = drafted + len(draft), accepted + right
            for n, next_token in enumerate(verified[: right + 1]):
                yield Token(next_token, drafted, accepted, from_draft=n < right)
            token, position_11 = verified[right], position_11 + right + 1
            left -= right + 1

    def draft(
        self, token: int, position_11: mx.array, max_draft: int
    ) -> tuple[list[int], mx.array]:
        """Tokens that may follow, and the hidden states (1, n + 1, D) of `token` and of them all,
        which the model's late layers have still to read."""
        drafted: list[int] = []
        states = [self.run_early_layers(token, position_11)]
        while len(drafted) < max_draft:
            token, odds = self.draft_token(states[-1], position_11 + len(drafted))
            drafted.append(token)
            states.append(self.run_early_layers(token, position_11 + len(drafted)))
            if odds < self.min_probability or token in self.ends:
                break
        self.run_twig(states[-1], position_11 + len(drafted))
        return drafted, mx.concatenate(states, axis=1)

    def verify(self, states_1LD: mx.array, position_11: mx.array) -> list[int]:
        """The model's own next token after each of these hidden states, in one pass."""
        language = self.prefill.language
        late = range(self.twig.layer, language.depth)
        x_1LD = self.prefill.run_layers(late, states_1LD, position_11)
        token_1L = np.array(mx.argmax(language.logits(x_1LD), axis=-1))
        return [int(token) for token in token_1L[0]]

    def crop(self, rows: int) -> None:
        """Forget the last rows of every layer, however many it holds."""
        for layer in (*self.prefill.cache, *self.reader.cache):
            layer.rewind(layer.rows - rows)

    def run_early_layers(self, token: int, position_11: mx.array) -> mx.array:
        """A token's hidden state (1, 1, D) where the twig grows."""
        x_11D = self.prefill.language.embed_tokens(mx.array([[token]]))
        return self.prefill.run_layers(range(self.twig.layer), x_11D, position_11)

    def draft_token(self, state_11D: mx.array, position_11: mx.array) -> tuple[int, float]:
        """The twig's most likely next token, and how likely it thinks it."""
        logits_V = self.twig.logits(self.run_twig(state_11D, position_11))[0, 0]
        share_V = mx.softmax(logits_V.astype(mx.float32))
        token, odds = mx.argmax(share_V), share_V.max()
        mx.eval(token, odds)
        return int(np.array(token)), float(np.array(odds))

    def run_twig(self, state_11D: mx.array, position_11: mx.array) -> mx.array:
        """The hidden state through the twig's layers."""
        every = range(len(self.twig.layers))
        return self.twig.run(every, state_11D, position_11, self.reader.cache)


def count_accepted(draft: list[int], verified: list[int]) -> int:
    """How many drafted tokens are the model's own, up to the first that is not."""
    pairs = enumerate(zip(draft, verified, strict=False))
    return next((i for i, (drafted, right) in pairs if drafted != right), len(draft))
