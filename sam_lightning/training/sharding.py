"""Sharded training by FSDP2: how a network is cut, and what its processes must share."""

from collections import Counter
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shards every parameter of `network` over the processes of `mesh`: block by block, and what is left as one.

    A block is a child with parameters, of a list or dictionary of modules each entry. One that shares a
    parameter with the rest of the network is left to the rest, since blocks that are sharded apart would no
    longer share it. What is sharded already stays as it is.
    """
    everywhere = _uses(network)
    apart = [block for block in _blocks(network) if all(everywhere[p] == uses for p, uses in _uses(block).items())]
    for module in [*apart, network]:
        if not isinstance(module, FSDPModule):
            sharded = fully_shard(module, mesh=mesh)
            # On the CPU of torch 2.8, gloo sums where FSDP2 asks it for the mean; divided explicitly it is right.
            sharded.set_force_sum_reduction_for_comms(mesh.device_type == "cpu")


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):  # no forward pass of their own to gather weights in
            yield from _blocks(child)
        elif any(True for _ in child.parameters()):
            yield child


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """How often each parameter stands in the module (a tensor's hash is its identity)."""
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))


def reshard(module: nn.Module) -> None:
    """Lets go of gathered weights, which do not follow when the sharded ones are changed."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@torch.no_grad()
def share_buffers(module: nn.Module) -> None:
    """Has every process take the buffers of the first one, such as running statistics; one broadcast per dtype."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers():
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        together = torch.cat([buffer.flatten() for buffer in buffers])
        dist.broadcast(together, src=0)
        for buffer, values in zip(buffers, torch.split(together, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(values.view_as(buffer))
