"""Stage `pruner` in a model of mlx-vlm's: a method's scores learn, the model stays as it is.

The language model reads all visual tokens, under a mask that leaves next to no attention to those
that the method would drop.

Shapes: N visual tokens of a view, L rows, V words.
"""

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
from .host_learner import HostLearner
from .pruner_weights import TRAINABLE
from .stage_rules import falling


class HostPruner(HostLearner):
    """Its weights are in `pruners`, by name; nothing else moves."""

    def __init__(self, host: Host, config: TrainConfig):
        name = _check(host, config)
        is_new = config.reset_pruner or name not in host.learned
        mx.random.seed(config.seed)
        untrained = METHODS[name].make_weights(host.feature_dims, 1)
        super().__init__(host, config, {name: untrained} if is_new else {})
        self.starts = MappingProxyType({name: is_new})
        self.pruners: dict[str, nn.Module] = {name: self.pipeline.steps[0].weights}
        self.source = find_folder(config.model)
        if self.source.resolve() in config.folder.resolve().parents:
            raise UserError(f"{config.folder} lies inside the model's own folder; write elsewhere")
        self.freeze()
        self.pruners[name].unfreeze()

    def logits(self, inputs: PreparedInputs) -> mx.array:
        if not self.training or inputs.pixels is None:  # behind the pruner as it is used
            return super().logits(inputs)
        host, c = self.host, self.settings
        views = encode_images_and_text(host, inputs, self.pipeline)
        budgets = budgets_by_view(views, c.keep_ratio, c.keep_tokens, self.pipeline)
        sizes = [view.signals.x_BND.shape[1] for view in views]
        prompt = prune_prompt(host, inputs, views, plan("none"), sizes, self.policy)
        ids_1L, arguments = self.embed(prompt)
        factors = [self._factor(view, K) for view, K in zip(views, budgets, strict=True)]
        bias_L = mx.zeros(ids_1L.shape[1])
        rows = np.flatnonzero(np.array(inputs.ids) == host.image_token_id(inputs))
        bias_L[mx.array(rows)] = mx.log(mx.concatenate(factors))
        x_1LD = arguments["inputs_embeds"]
        mask_11LL = _mask(bias_L).astype(x_1LD.dtype)
        return host.masked_logits(ids_1L, x_1LD, mask_11LL, arguments.get("position_ids"))

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
    able = [n for n, m in METHODS.items() if m.training_factor and not m.training_loss]
    if TRAINABLE.of_chain(config.pruner) != [config.pruner] or config.pruner not in able:
        raise UserError(
            f"pruner {config.pruner} does not learn in a model of mlx-vlm's; {either(able)} does,"
            " alone"
        )
    if host.feature_dims is None:
        raise UserError(f"no pruner learns in a {host.kind} model of mlx-vlm's yet")
    if host.embed(mx.array([0])).dtype == mx.float16:
        raise UserError(
            f"{config.pruner} learns by the attention that dropped tokens would get, which float16"
            " cannot hold; train in dtype bfloat16 or float32"
        )
    return config.pruner


def _mask(bias_L: mx.array) -> mx.array:
    """What is added to the attention of rows, which see earlier ones; themselves without bias."""
    L = bias_L.size
    bias_LL = mx.where(mx.eye(L, dtype=mx.bool_), 0, bias_L[None])
    is_visible_LL = mx.tril(mx.ones((L, L), mx.bool_))
    return mx.where(is_visible_LL, bias_LL, -mx.inf)[None, None]
