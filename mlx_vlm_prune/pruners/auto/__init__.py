"""`auto`: which method prunes, and how many tokens stay, for a model, a budget and a prompt.

choice.py chooses: by the last evaluation of the very model (evidence.py), else by the published
order; the table of reasons and their sources is reasons.py. measured.py knows what methods cost on
this machine, caution.py which prompts are worth more tokens.
"""

from ..spec import AUTO
from .caution import cautious
from .choice import AutoChoice, ModelFacts, choose, choose_for_clip

__all__ = ["AUTO", "AutoChoice", "ModelFacts", "cautious", "choose", "choose_for_clip"]
