"""Self-speculative decoding with a twig (TwigVLM, arXiv:2503.14075), one prompt at a time.

The twig drafts from the base's first K layers, whose rows the base's other layers then need not
make again; the answer is that of greedy decoding.

Shapes: L rows of the prompt, n drafted tokens, D features, V words.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlx_vlm_prune.checkpoints.errors import UserError

from . import decoder
from .language.splice import Row
from .language.twig import Twig
from .model import VLM
from .pruners import Step


@dataclass
class Answer:
    """New ids without the end token; every draft, and how much of each was right."""

    ids: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@dataclass
class Grown:
    """A twig's rows of what was read so far."""

    twig: Twig
    rows: list[list[Tensor]]
    bias_S: Tensor
    after: int  # where the next token stands

    @classmethod
    def on(cls, language: Any, twig: Twig, prompt: decoder.Prompt) -> "Grown":
        """With the prompt as it comes to the twig's layer."""
        L, rows = prompt.x_1LD.shape[1], [list[Tensor]() for _ in twig.layers]
        mask_LL = decoder.causal(L, prompt.x_1LD.device) + prompt.bias_L
        rotary, x_1LD = language.rotary(prompt.position_1L), prompt.x_1LD
        for layer, held in zip(twig.layers, rows, strict=True):
            x_1LD = layer(x_1LD, rotary, mask_LL[None, None], held)
        return cls(twig, rows, prompt.bias_L, prompt.after)

    def odds(self, language: Any, x_11D: Tensor) -> Tensor:
        """How likely every word is (V,) after a token with this hidden state; its rows stay."""
        rotary = language.rotary(torch.tensor([[self.after]], device=x_11D.device))
        self.bias_S, self.after = F.pad(self.bias_S, (0, 1)), self.after + 1
        for layer, held in zip(self.twig.layers, self.rows, strict=True):
            x_11D = layer(x_11D, rotary, self.bias_S[None, None, None], held)
        return self.twig.head(self.twig.norm(x_11D))[0, 0].softmax(-1)

    def forget(self, n: int) -> None:
        for held in self.rows:
            held[:] = [rows[:, :, : rows.shape[2] - n] for rows in held]
        self.bias_S, self.after = self.bias_S[: len(self.bias_S) - n], self.after - n


@torch.no_grad()
def speculate(
    model: VLM,
    row: Row,
    pixels_I3HW: Tensor | None,
    pruner: str | Sequence[Step] = "none",
    K: int | None = None,
    positions: str = "keep",
    options: Mapping[str, Any] | None = None,
    *,
    most: int = 5,
    sure: float = 0.6,
    max_tokens: int = 64,
) -> Answer:
    """Arguments up to `options` as of `VLM.logits`; then the longest draft, the odds below
    which a draft ends, and how many tokens to say. Raises UserError without a twig."""
    twig, language, end = model.learned.get("twig"), model.language, model.config.eos_token_id
    if twig is None:
        raise UserError("this model holds no twig to speculate with")
    spliced, plan = model.read([row], pixels_I3HW, pruner, K, positions, options)
    prompt, fork = decoder.Prompt.of(spliced, 0), int(twig.layer)
    done = decoder.read(language, prompt, model.grid, plan, fork)
    assert done.fork is not None
    grown, answer = Grown.on(language, twig, done.fork), Answer()
    said = [int(language.logits(done.hidden_1LD[:, -1]).argmax())]
    late = range(fork, len(language.layers))
    while said[-1] != end and len(said) < max_tokens:
        n = min(most, max_tokens - len(said) - 1)
        draft, states_1nD = _draft(language, done, grown, said[-1], n, sure, end)
        hidden_1nD = decoder.onward(language, done, late, states_1nD)
        judged = language.logits(language.norm(hidden_1nD))[0].argmax(-1).tolist()
        right = 0
        while right < len(draft) and draft[right] == judged[right]:
            right += 1
        decoder.forget(done, len(draft) - right)
        grown.forget(len(draft) - right)
        said += judged[: right + 1]
        answer.drafts.append(draft)
        answer.accepted.append(right)
    answer.ids = said[: said.index(end)] if end in said else said
    return answer


def _draft(
    language: Any, done: decoder.Cached, grown: Grown, token: int, most: int, sure: float, end: int
) -> tuple[list[int], Tensor]:
    """Up to `most` guesses at what comes after a token; its hidden state and theirs, (1, n, D)."""
    tokens, states, last = [token], [], 1.0
    for token in tokens:  # which grow on the way
        x_11D = language.embed_tokens(torch.tensor([[token]], device=done.hidden_1LD.device))
        states.append(decoder.onward(language, done, range(int(grown.twig.layer)), x_11D))
        odds_V = grown.odds(language, states[-1])
        goes_on = last >= sure and (len(tokens) == 1 or token != end)
        if goes_on and len(tokens) <= most:
            last = float(odds_V.max())
            tokens.append(int(odds_V.argmax()))
    return tokens[1:], torch.cat(states, dim=1)
