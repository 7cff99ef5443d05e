"""The processes that train together, as torchrun starts them; mostly one.

Each reads its share of every batch. What they sum is the same in all of them, so that their weights
stay the same.
"""

import os
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from mlx_vlm_prune.machine.agreement import Agreement


class Processes(Agreement):
    """The group that torchrun's variables name: by gloo, or by NCCL on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.size = device, 0, int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            if not dist.is_initialized():
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.rank = dist.get_rank()

    def sum(self, values: Sequence[float]) -> list[float]:
        """Of each value over all processes."""
        if self.size == 1:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(list(values), dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def sum_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Of gradients over all processes, in place."""
        for gradient in gradients if self.size > 1 else ():
            dist.all_reduce(gradient)


def own_device(device: torch.device) -> torch.device:
    """Of several CUDA devices, this process's."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device
