"""A server's parts put together, for a model of ours or of mlx-vlm's."""

from dataclasses import replace
from typing import Any

from fastapi import FastAPI

from ..checkpoints.errors import UserError
from ..generation.request import Request
from ..generation.running_batch import OwnRunningBatch, ServedBatch
from ..hosts.running_batch import HostRunningBatch
from ..models.vlm import VLM
from ..pruners import AUTO
from .app import build_app
from .auto_methods import AutoMethods
from .engine import Engine
from .memory import AnswerMemory
from .metrics import Metrics
from .settings import ServerSettings
from .time_budget import TimeBudgets


def build_server(model: Any, processor: Any, settings: ServerSettings) -> FastAPI:
    """The application that answers with a model of ours or of mlx-vlm's. Raises UserError where the
    model cannot prune as the settings say."""
    batch: ServedBatch
    if isinstance(model, VLM):
        batch = OwnRunningBatch(model, processor, settings.cache_bytes)
    else:
        batch = HostRunningBatch(model, processor, settings.batch, settings.cache_bytes)
    metrics, times = Metrics(), TimeBudgets(model, processor)
    try:
        auto = AutoMethods(model, processor, times, settings.caution)
        if settings.is_pruning and settings.method != AUTO:  # else every request would end
            options = settings.method, settings.keep_ratio, settings.keep_tokens
            batch.check(Request("", [], *options))
        if settings.budget_ms is not None:
            times.calibrate(auto.calibrated_method(settings.method))
        memory = AnswerMemory.of(model, processor, settings.cache_bytes)
    except UserError:
        batch.close()
        raise
    settings = replace(
        settings, places_pictures=isinstance(model, VLM), why_no_clips=batch.why_no_clips
    )
    engine = Engine(batch, settings.batch, metrics, times, memory, auto)
    return build_app(engine, settings, metrics)
