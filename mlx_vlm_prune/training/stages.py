"""The stages by name: what learns in each."""

from .adapters import Adapters
from .learner import Learner
from .twig_stage import TwigStage

LEARNERS: dict[str, type[Learner]] = {
    "pretrain": Learner,
    "sft": Learner,
    "lora": Adapters,
    "dora": Adapters,
    "pruner": Learner,
    "twig": TwigStage,
}
