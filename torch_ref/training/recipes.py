"""Every number of the trainings. Imports no torch, so that their commands can tell of them."""

from dataclasses import dataclass

LEARNED = ("attention_pool", "score_prune", "mlp", "twig")  # what `train_pruners` trains


@dataclass(frozen=True)
class ScenesRecipe:
    """The scenes model, from nothing."""

    tower_steps: int = 1500  # the first stage
    steps: int = 7000  # both stages
    decay: float = 0.25  # the last share of the steps, in which the rate falls to zero
    warmup: int = 100
    batch: int = 32  # pictures
    question_tokens: int = 224  # per picture
    muon_rate: float = 2e-3  # matrices
    adam_rate: float = 1.5e-3  # all else
    weight_decay: float = 0.01
    dense_weight: float = 0.5  # of the patch loss in the second stage
    seed: int = 1


@dataclass(frozen=True)
class PrunerRecipe:
    """A learned pruner of it."""

    keep_tokens: int = 49  # the middle one of a scorer's three budgets
    steps: int = 600
    warmup: int = 30
    batch: int = 8  # pictures
    question_tokens: int = 224  # per picture
    rate: float = 2e-3
    model_rate: float = 2e-4  # of tower and language model, when they learn along
    noise: float = 1.0  # of the scores, falling to zero
    twig_layer: int = 1  # 2 of 32 in the paper
    twig_layers: int = 1  # 3 of 32
    twig_rate: float = 1e-3
    seed: int = 3
