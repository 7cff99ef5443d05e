"""What a command says of a checkpoint's own wishes, before it answers: sampling, and thinking."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoints.processor import GENERATION_CONFIG
from ..checkpoints.reading.files import optional_json

logger = logging.getLogger("mlx_vlm_prune")
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def note_sampling(model: Any, processor: Any, temperature: float) -> None:
    """One line where generation_config.json asks for sampling, and answers are greedy."""
    folder = getattr(processor, "folder", None) or getattr(model, "model_path", None)
    config = optional_json(Path(folder) / GENERATION_CONFIG) if folder else {}
    if temperature or config.get("do_sample") is not True:
        return
    values = {name: config.get(name) for name in SAMPLING}
    options = [f"{name}={value}" for name, value in values.items() if type(value) in (int, float)]
    logger.info(
        "this checkpoint's generation_config.json asks for sampling, and answers are greedy here;"
        " %s samples", " ".join(options or ["temperature=1"]),
    )  # fmt: skip


def note_thinking(processor: Any, chat_template_config: Mapping[str, Any] | None) -> None:
    """One line where enable_thinking is given and the chat template does not read it."""
    parts = (processor, getattr(processor, "tokenizer", None))
    templates = [getattr(part, "chat_template", None) for part in parts]
    asks = (chat_template_config or {}).get("enable_thinking")
    if asks and not any("enable_thinking" in str(template) for template in templates):
        logger.info("this model's chat template does not read enable_thinking")
