"""The budget of a command line of `generate`: limits of time and memory, and what meets them."""

import argparse
import logging
from dataclasses import replace
from functools import partial
from typing import Any

from ..checkpoints.errors import UserError
from ..generation.arguments import decoding_options
from ..generation.request import make_request, pixel_limit
from ..generation.stream import default_pruner
from ..hosts.auto import Why, is_auto, with_method
from ..models.vlm import VLM
from ..pruners import AUTO
from . import host_budgets
from .auto_budgets import choose_within
from .budgets import Budget, BudgetChoice, keep_within

logger = logging.getLogger("mlx_vlm_prune")
NAMES = ("pruner", "keep_ratio", "keep_tokens")


def limits_of(args: argparse.Namespace) -> Budget | None:
    """The limits that the flags say, if any. Raises UserError for flags that go with none."""
    if args.ms is None and args.gb is None:
        return None
    if getattr(args, "video", None):
        raise UserError("a video's budget is a keep_ratio or keep_tokens, not of time or memory")
    if not args.image:
        raise UserError("a budget needs an --image; without one there is nothing to prune")
    if args.keep_ratio is not None or args.keep_tokens is not None:
        raise UserError(
            "--budget-ms and --budget-gb choose how many tokens to keep; leave out --keep-ratio"
            " and --keep-tokens"
        )
    if args.num_draft_tokens is not None:
        raise UserError(
            "--budget-ms and --budget-gb do not count what a twig takes; leave out"
            " --num-draft-tokens"
        )
    return Budget(args.ms, args.gb)


def budget_of(
    args: argparse.Namespace, model: Any, processor: Any, prompt: str, limits: Budget | None
) -> tuple[dict[str, Any], BudgetChoice | None, Why | None]:
    """The method and what it keeps, as options of `generate`; the choice of K for `limits`; and why
    `auto` chose the method. Raises UserError."""
    flags = {name: getattr(args, name) for name in (*NAMES, "caution")}
    request = make_request(prompt, args.image, decoding_options(args) | flags)
    if limits is None:
        request, why = with_method(model, processor, request)
        args.image = [*request.images]  # those that are open now
        return {name: getattr(request, name) for name in NAMES}, None, why
    pruner, why = args.pruner or default_pruner(model), None
    if args.pruner is None and pruner == "none":
        request = replace(request, pruner=AUTO)
    within = partial(_keep_within, args, model, processor, prompt, limits)
    if is_auto(model, request):
        choice, line = choose_within(model, processor, within, request)
        why = Why(line, 0.0)  # what calibrations take is no part of an answer
    else:
        choice = within(pruner)
    if choice.reason:
        logger.warning(choice.reason)
    return choice.options, choice, why


def _keep_within(
    args: argparse.Namespace, model: Any, processor: Any, prompt: str, limits: Budget, pruner: str
) -> BudgetChoice:
    """The choice of K for a method."""
    if isinstance(model, VLM):
        return keep_within(
            model, processor, prompt, args.image, pruner=pruner, ms=limits.ms, gb=limits.gb,
            max_tokens=args.max_tokens, chat_template_config=args.chat_template_config,
            system=args.system, max_pixels=pixel_limit(args.max_pixels, None),
        )  # fmt: skip
    request = make_request(prompt, args.image, {"pruner": pruner, **decoding_options(args)})
    return host_budgets.keep_within(model, processor, request, limits)
