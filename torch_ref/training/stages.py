"""The stages by name: what learns in each."""

from .learner import FineTune, Learner, Pretrain

LEARNERS: dict[str, type[Learner]] = {"pretrain": Pretrain, "sft": FineTune}
