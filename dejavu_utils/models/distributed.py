"""Several processes that share a batch: who am I, the joint batch, and batch norms over all of
it.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


def start(device: str) -> tuple[int, int, str]:
    """Return (rank, processes, device) after joining the group that torchrun describes; (0, 1,
    device) without it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1, device
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def rank() -> int:
    """Return this process's number in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def alone() -> bool:
    """Return whether there is no other process."""
    return not dist.is_initialized() or dist.get_world_size() == 1


def gather(part: Tensor) -> Tensor:
    """Return the joint batch of all processes, in the order of their ranks; gradients flow back to
    each part.

    Every process computes the same loss L of the joint batch. The backward pass of the gathering
    sums W equal gradients, and averaging over W processes (DistributedDataParallel) makes that dL
    again.
    """
    if alone():
        return part
    from torch.distributed.nn.functional import all_gather

    if not part.requires_grad:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)
    return torch.cat(all_gather(part.contiguous()))


class _SyncBatchNorm(nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 the base of all norms
    """BatchNorm over the joint batch on any device: torch's own SyncBatchNorm needs a GPU. Parts
    must be equal.
    """

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or alone():
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        axes = [axis for axis in range(x.ndim) if axis != 1]
        moments = torch.stack([x.mean(axes), (x * x).mean(axes)])
        mean, square = all_reduce(moments) / dist.get_world_size()
        variance = square - mean * mean
        n = x.numel() // x.shape[1] * dist.get_world_size()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        shape = [1, -1] + [1] * (x.ndim - 2)
        scaled = (x - mean.view(shape)) * torch.rsqrt(variance.view(shape) + self.eps)
        return scaled * self.weight.view(shape) + self.bias.view(shape)


def synchronise(module: nn.Module, device: str) -> nn.Module:
    """Return `module` with batch norms over the joint batch, the names of its weights unchanged."""
    if device.startswith("cuda"):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 of any dimension
            norm.__class__ = _SyncBatchNorm  # the same state, another forward
    return module
