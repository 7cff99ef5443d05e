"""Self-speculative decoding with a twig (TwigVLM, arXiv:2503.14075), one prompt at a time.

The twig drafts from the base's first K layers, whose rows the base's other layers then need not
make again; the answer is that of greedy decoding.

Shapes: L rows of the prompt, n drafted tokens, D features, V words.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mlx_vlm_prune.checkpoints.errors import UserError

from ..models import decoder
from ..models.language.twig import Twig
from ..models.splice import Spliced
from ..models.vlm import VLM


@dataclass
class Answer:
    """New ids without the end token; every draft, and how much of each was right."""

    ids: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


class Speculation:
    """A prompt that the base and the twig have read; `draft` and `verify` change both caches."""

    def __init__(self, model: VLM, twig: Twig, spliced: Spliced, cuts: decoder.Cuts):
        self.language, self.twig, self.end = model.language, twig, model.eos_token_id
        self.early = range(int(twig.layer))
        self.late = range(int(twig.layer), len(self.language.layers))
        prompt = decoder.PromptRows.of(spliced, 0)
        self.base = decoder.read_prompt(self.language, prompt, model.grid, cuts, self.late.start)
        rows = self.base.observed
        assert rows is not None
        self.grown = decoder.PromptCache(rows.x_1LD)
        for i in range(len(twig.layers)):
            rows = self.grown.read_layer(twig, i, rows)

    def next_odds(self, x_11D: Tensor) -> Tensor:
        """The twig's probability of every word (V,) after a token with this hidden state."""
        x_11D = decoder.run_layers(self.twig, self.grown, range(len(self.twig.layers)), x_11D)
        return self.twig.head(self.twig.norm(x_11D))[0, 0].softmax(-1)

    def draft(self, token: int, max_draft: int, min_probability: float) -> tuple[list[int], Tensor]:
        """Up to `max_draft` guesses at what comes after a token; its hidden state and theirs,
        (1, n, D)."""
        tokens, states, last_odds = [token], [], 1.0
        for token in tokens:  # which grow on the way
            ids_11 = torch.tensor([[token]], device=self.base.hidden_1LD.device)
            x_11D = self.language.embed_tokens(ids_11)
            states.append(decoder.run_layers(self.language, self.base, self.early, x_11D))
            odds_V = self.next_odds(states[-1])
            goes_on = last_odds >= min_probability and (len(tokens) == 1 or token != self.end)
            if goes_on and len(tokens) <= max_draft:
                last_odds = float(odds_V.max())
                tokens.append(int(odds_V.argmax()))
        return tokens[1:], torch.cat(states, dim=1)

    def verify(self, draft: list[int], states_1nD: Tensor) -> list[int]:
        """The base's own words: those of the draft that are right, and one more."""
        hidden_1nD = decoder.run_layers(self.language, self.base, self.late, states_1nD)
        verified = self.language.logits(self.language.norm(hidden_1nD))[0].argmax(-1).tolist()
        right = 0
        while right < len(draft) and draft[right] == verified[right]:
            right += 1
        for cache in (self.base, self.grown):
            decoder.rewind(cache, len(draft) - right)
        return verified[: right + 1]


@torch.no_grad()
def speculate(
    model: VLM, spliced: Spliced, cuts: decoder.Cuts,
    *, max_draft: int = 5, min_probability: float = 0.6, max_tokens: int = 64,
) -> Answer:  # fmt: skip
    """The answer to one prompt that `VLM.embed` gave, with the longest draft, the odds below which
    a draft ends, and how many tokens to say. Raises UserError without a twig."""
    twig = model.learned.get("twig")
    if twig is None:
        raise UserError("this model holds no twig to speculate with")
    turns, answer = Speculation(model, twig, spliced, cuts), Answer()
    ids = [int(model.language.logits(turns.base.hidden_1LD[:, -1]).argmax())]
    while ids[-1] != turns.end and len(ids) < max_tokens:
        draft, states_1nD = turns.draft(
            ids[-1], min(max_draft, max_tokens - len(ids) - 1), min_probability
        )
        words = turns.verify(draft, states_1nD)
        ids += words
        answer.drafts.append(draft)
        answer.accepted.append(len(words) - 1)
    answer.ids = ids[: ids.index(turns.end)] if turns.end in ids else ids
    return answer
