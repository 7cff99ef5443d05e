"""Stage `pruner` in a model of mlx-vlm's: a method's weights learn, the model stays as it is.

While scores learn, the language model reads all visual tokens, under a mask that leaves next to no
attention to those that the method would drop. Slots that are pooled learn as they are used.

Shapes: N visual tokens of a view, L rows, V words.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from ..checkpoints.command_line import either
from ..checkpoints.errors import UserError
from ..hosts.host import Host
from ..hosts.prepared_inputs import PreparedInputs
from ..hosts.prompt import budgets_by_view, encode_images_and_text, prune_prompt
from ..hosts.views import View
from ..models.arrays import to_raw
from ..models.loading import find_folder
from ..pruners import METHODS, plan
from .config import TrainConfig
from .host_folder import write_linked
from .host_learner import HostLearner, answer_loss
from .pruner_weights import TRAINABLE
from .stage_rules import falling


class HostPruner(HostLearner):
    """Its weights are in `pruners`, by name; nothing else moves."""

    def __init__(self, host: Host, config: TrainConfig):
        name = _check(host, config)
        is_new = config.reset_pruner or name not in host.learned
        mx.random.seed(config.seed)
        untrained = METHODS[name].make_weights(host.feature_dims, config.keep_tokens or 1)
        super().__init__(host, config, {name: untrained} if is_new else {})
        self.starts = MappingProxyType({name: is_new})
        self.pruners: dict[str, nn.Module] = {name: self.pipeline.steps[0].weights}
        self.source = find_folder(config.model)
        if self.source.resolve() in config.folder.resolve().parents:
            raise UserError(f"{config.folder} lies inside the model's own folder; write elsewhere")
        self.freeze()
        self.pruners[name].unfreeze()

    def saved_parameters(self) -> dict[str, mx.array]:
        """Of the pruner, with what the loss itself moves."""
        named: Any = tree_flatten({"pruners": self.pruners})
        return dict(named)

    def moved_by_loss(self) -> dict[str, mx.array]:
        """What the loss itself moves, beside the optimizer."""
        trainable: Any = dict(tree_flatten(self.trainable_parameters()))
        saved = self.saved_parameters()
        return {name: array for name, array in saved.items() if name not in trainable}

    def losses_of(self, inputs: PreparedInputs, count: int) -> tuple[mx.array, mx.array]:
        """Of one example; behind the pruner as it is used, unless its scores learn."""
        step = self.pipeline.steps[0]
        method = step.method
        if not self.training or inputs.pixels is None or not method.training_factor:
            return super().losses_of(inputs, count)
        c, views = self.settings, encode_images_and_text(self.host, inputs, self.pipeline)
        budgets = budgets_by_view(views, c.keep_ratio, c.keep_tokens, self.pipeline)
        logits = self._whole_prompt(inputs, views)

        def loss_of(bias_by_view: list[mx.array]) -> mx.array:
            return answer_loss(logits(bias_by_view), inputs, count)

        factors = [self._factor(view, K) for view, K in zip(views, budgets, strict=True)]
        loss = answers = loss_of([mx.log(factor_N) for factor_N in factors])
        if method.training_loss:
            no_bias = [mx.zeros(view.signals.x_BND.shape[1]) for view in views]
            for view, gradient_N in zip(views, mx.grad(loss_of)(no_bias), strict=True):
                gradient_1N = mx.stop_gradient(gradient_N)[None]
                beside = method.training_loss(step.weights, view.signals.constant, gradient_1N)
                loss = loss + count * beside / len(views)
        return loss, answers

    def _whole_prompt(
        self, inputs: PreparedInputs, views: list[View]
    ) -> Callable[[list[mx.array]], mx.array]:
        """A function from what is added to the attention that each view's tokens get, (N,) each, to
        the logits (1, L, V) behind all of them."""
        host = self.host
        sizes = [view.signals.x_BND.shape[1] for view in views]
        prompt = prune_prompt(host, inputs, views, plan("none"), sizes, self.policy)
        ids_1L, arguments = self.embed(prompt)
        rows = mx.array(np.flatnonzero(np.array(inputs.ids) == host.image_token_id(inputs)))
        x_1LD, positions = arguments["inputs_embeds"], arguments.get("position_ids")

        def logits(bias_by_view: list[mx.array]) -> mx.array:
            bias_L = mx.zeros(ids_1L.shape[1])
            bias_L[rows] = mx.concatenate(bias_by_view)
            mask_11LL = _mask(bias_L).astype(x_1LD.dtype)
            return host.masked_logits(ids_1L, x_1LD, mask_11LL, positions)

        return logits

    def _factor(self, view: View, K: int) -> mx.array:
        """On the attention that the tokens of a view get in this step, (N,)."""
        step, N = self.pipeline.steps[0], view.signals.x_BND.shape[1]
        method = step.method
        assert method.training_factor
        budget = min(N, method.training_budget(K, self.iteration))
        noise = self.settings.noise * falling(self.iteration, self.iters)
        factor_1N: mx.array = method.training_factor(
            step.weights, view.signals.constant, budget, noise
        )
        return factor_1N[0]

    def save_model(self, folder: Path) -> None:
        """The folder of the model, its weights linked, with those of the pruner."""
        named: Any = tree_flatten(self.pruners)
        write_linked(self.source, {name: to_raw(array) for name, array in named}, folder)


def _check(host: Host, config: TrainConfig) -> str:
    """The one method that learns. Raises UserError where it cannot."""
    name = config.pruner
    if TRAINABLE.of_chain(name) != [name]:
        able = [name for name in TRAINABLE.names if METHODS[name].learned]
        raise UserError(
            f"pruner {name} does not learn in a model of mlx-vlm's; {either(able)} does, alone"
        )
    if reason := host.why_not_learned:
        raise UserError(f"no pruner learns in a {host.kind} model of mlx-vlm's: {reason}")
    method = METHODS[name]
    if method.training_factor and host.embed(mx.array([0])).dtype == mx.float16:
        raise UserError(
            f"{name} learns by the attention that dropped tokens would get, which float16"
            " cannot hold; train in dtype bfloat16 or float32"
        )
    if method.has_trained_slots and (reason := host.why_no_feature_gradient):
        raise UserError(f"{name} does not learn in a {host.kind} model: {reason}")
    if method.has_trained_slots and config.keep_tokens is None:
        raise UserError(f"{name} makes a number of slots from every image: give keep_tokens")
    return name


def _mask(bias_L: mx.array) -> mx.array:
    """What is added to the attention of rows, which see earlier ones; themselves without bias."""
    L = bias_L.size
    bias_LL = mx.where(mx.eye(L, dtype=mx.bool_), 0, bias_L[None])
    is_visible_LL = mx.tril(mx.ones((L, L), mx.bool_))
    return mx.where(is_visible_LL, bias_LL, -mx.inf)[None, None]
