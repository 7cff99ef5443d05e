"""Whether answers fit into memory together: their rows are padded to those of the longest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..checkpoints.errors import UserError
from ..hosts.families import host_of
from ..machine.hardware import on_cpu
from ..models.cache import STEP
from ..models.memory import available_bytes
from ..models.vlm import VLM
from ..planning.host_operations import row_bytes
from ..planning.operations import cache_bytes

DEVICE_LIMITS = ("max_recommended_working_set_size", "memory_size", "total_memory")
SHARE = 0.8  # of what is free; the rest is for towers, prompts that are read, and requests
FEWER_TOKENS = "ask for fewer max_tokens"
FEWER_ROWS = "send fewer pictures or shorter texts, or keep fewer visual tokens"
COPIES = 2  # a batch that a prompt joins, and the one before


@dataclass(frozen=True)
class AnswerMemory:
    """The bytes of a row in all layers, and those that the rows of all answers may take."""

    row_bytes: int
    most_bytes: int

    @classmethod
    def of(cls, model: Any, processor: Any, held_bytes: int) -> "AnswerMemory":
        """What a model that was loaded leaves; `held_bytes` are for earlier prompts. Raises
        UserError where that is more than there is."""
        if isinstance(model, VLM):
            text = model.config.text
            size = cache_bytes(text, [1] * text.num_hidden_layers, model.dtype.size)
        else:
            size = row_bytes(host_of(model, processor))
        free = free_bytes()
        if held_bytes >= free:
            raise UserError(
                f"cache_gb is {held_bytes / 1e9:g}, and {free / 1e9:.1f} GB are free; give less"
            )
        return cls(size, int(SHARE * (free - held_bytes)))

    def holds(self, rows: Sequence[int]) -> bool:
        """Do answers of so many rows fit, with their prompts?"""
        longest = -(-max(rows, default=0) // STEP) * STEP
        return COPIES * len(rows) * longest * self.row_bytes <= self.most_bytes

    def check(self, prompt: int, answer: int) -> None:
        """Raises UserError for an answer of so many rows that would not even fit alone, with so
        many of its prompt's."""
        if not self.holds([prompt + answer]):
            most = self.most_bytes // (COPIES * self.row_bytes * STEP) * STEP
            advice = FEWER_TOKENS if prompt < most else FEWER_ROWS
            raise UserError(
                f"the prompt has {prompt} rows, and its answer may have {answer}; this server has"
                f" memory for {most} together: {advice}"
            )


def free_bytes() -> int:
    """Memory beside the weights. A GPU's own is its limit; on Linux it is what is free now."""
    device: dict[str, Any] = {} if on_cpu() else mx.device_info()
    limits = [device[name] for name in DEVICE_LIMITS if name in device]
    if limits:
        return max(0, min(limits) - mx.get_active_memory())
    available = available_bytes()
    return (1 << 60) if available is None else available
