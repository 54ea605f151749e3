"""Sharded training by FSDP2: how a network is cut, and what its processes must share."""

from collections import Counter
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shards every parameter of `network` over the processes of `mesh`: block by block, and what is left as one.

    A block is a child with parameters, of a list or dictionary of modules each entry. One that shares a
    parameter with the rest of the network is left to the rest, since blocks that are sharded apart would no
    longer share it. A network that is sharded already stays as it is.
    """
    if isinstance(network, FSDPModule):
        return
    everywhere = _uses(network)
    for block in list(_blocks(network)):
        if all(everywhere[parameter] == uses for parameter, uses in _uses(block).items()):
            fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


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


def share_buffers(module: nn.Module) -> None:
    """Has every process take the buffers of the first one, such as running statistics."""
    for buffer in module.buffers():
        dist.broadcast(buffer, src=0)
