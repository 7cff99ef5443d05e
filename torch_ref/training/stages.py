"""The stages by name: what learns in each."""

from .adapters import Adapters
from .learner import FineTune, Learner, Pretrain, PrunerStage
from .twig_stage import TwigStage

LEARNERS: dict[str, type[Learner]] = {
    "pretrain": Pretrain,
    "sft": FineTune,
    "lora": Adapters,
    "dora": Adapters,
    "pruner": PrunerStage,
    "twig": TwigStage,
}
