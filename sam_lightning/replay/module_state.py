"""What a training step may change besides the trained weights: buffers, metrics, queues, counters, teachers."""

from collections.abc import Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sam_lightning.replay.attributes import Attributes, Owner, objects_in, with_prefixes
from sam_lightning.replay.batch_copies import version
from sam_lightning.replay.mutable_values import is_small
from sam_lightning.tensors.copies import copies, copy_by_kind
from sam_lightning.tensors.shards import local_parts

_SETTINGS_ONLY = ("torch.", "torchvision.")  # packages whose modules' attributes are settings


@dataclass
class _Tracked:
    """A tensor of the state around one pass and the next."""

    name: str
    tensor: Tensor
    kind: str  # buffer, attribute or parameter
    version: int  # when the pass began that is running
    start: Tensor | None = None  # what it was before the first pass, where that is known
    checksum: Tensor | None = None  # of what it was, in the first pass ever and where it is not known
    end: Tensor | None = None  # what the first pass left, if it changed it


class ModuleState:
    """Takes and restores the state of a module around a pass that may change it.

    State is every buffer, every parameter that is not trained, and every attribute of submodules and of plain objects
    that they hold: tensors, numbers, lists, dictionaries, arrays, generators; torchmetrics are modules like others.
    Attributes of torch's and torchvision's own modules are settings, and are left alone; of sparse tensors only the
    object is kept. Containers are looked into until they have had 10,000 elements in all; of the others, lists are
    taken for such that only grow, and the rest is left alone.

    A tensor of up to 1 MiB is copied every time. Of a larger buffer one copy is kept, and renewed where the version
    counter says that it has changed, so that a constant one costs no step more than its memory. Changes through `.data`
    escape that counter: all are compared once, after the first pass ever, and those that changed count as changed from
    then on. Parameters that are not trained are copied for that first comparison only, if they are not far more than
    the trained ones; those that it finds changed, such as a teacher's, are copied every time.

    Args:
        module: The module.
        trained: Gives its parameters that the optimizer moves now; a finetuning may thaw some later.
        running_stats: Whether normalisation layers' running statistics are part of the state.

    Attributes:
        unguarded: Names of tensors that were changed without a copy of what they had been; emptied by the reader.
        teachers: Names of parameters that are not trained, and that passes change.
    """

    def __init__(self, module: nn.Module, trained: Callable[[], Iterable[Tensor]], running_stats: bool = True) -> None:
        self.unguarded: list[str] = []
        self.teachers: list[str] = []
        self._module = module
        self._trained = trained
        self._running_stats = running_stats
        self._changing: set[str] = set()  # names of tensors that passes are known to change
        self._unseen: set[str] = set()  # those of them whose version counters do not tell
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}  # large tensors: the tensor, its version, its copy
        self._owners: dict[int, Owner] = {}  # by the identity of what they own
        self._has_observed_a_pass = False
        moved = set(trained())
        others = sum(p.numel() for p in module.parameters() if p not in moved and not is_lazy(p))
        self._compares_others = others <= 2 * sum(p.numel() for p in moved if not is_lazy(p)) + 2**20

    @torch.no_grad()
    def take(self) -> None:
        """Notes the state before a pass."""
        self._modules = list(with_prefixes(self._module))
        self._where = list(self._find_owners())
        self._owners = {id(owner.attributes): owner for owner in self._where}
        self._start = Attributes(self._where)
        self._tracked = [_Tracked(name, tensor, kind, version(tensor)) for name, tensor, kind in self._tensors()]
        copied = [tracked for tracked in self._tracked if self._is_copied(tracked)]
        for tracked, start in zip(copied, copies([tracked.tensor for tracked in copied]), strict=True):
            tracked.start = start
        for tracked in self._tracked:
            if tracked.start is None:
                tracked.start = self._kept_copy(tracked)
            if tracked.start is None and not self._has_observed_a_pass:
                tracked.checksum = _checksum(tracked.tensor)
        buffers = (buffer for _, module in self._modules for buffer in module._buffers.values())
        self._lazy = [b for b in buffers if b is not None and is_lazy(b)]  # made by the first pass ever

    @torch.no_grad()
    def rewind(self) -> None:
        """After the pass: notes the state in which it ended, and restores the one in which it began."""
        moved = set(map(id, self._trained()))  # more than before the pass if it has thawed some
        self._tracked = [tracked for tracked in self._tracked if id(tracked.tensor) not in moved]
        self._tracked += [_Tracked("", b, "buffer", -1, None) for b in self._lazy if not is_lazy(b)]
        changed = [tracked for tracked in self._tracked if self._has_changed(tracked)]
        for tracked, end in zip(changed, copies([tracked.tensor for tracked in changed]), strict=True):
            tracked.end = end
        if not self._has_observed_a_pass:
            self._has_observed_a_pass = True
            buffers = {tracked.name for tracked in self._tracked if tracked.kind == "buffer"}
            self._kept = {name: kept for name, kept in self._kept.items() if name in buffers}
        for owner in self._where:
            owner.look()
        self._end = Attributes(self._where)
        self._start.restore()
        _restore([(t.tensor, t.start) for t in changed])
        for tracked in self._tracked:
            tracked.version = version(tracked.tensor)

    @torch.no_grad()
    def fast_forward(self) -> None:
        """After another pass: restores the state in which the first one ended."""
        self._end.restore()
        changed = (t for t in self._tracked if t.end is not None or version(t.tensor) != t.version)
        _restore([(t.tensor, t.start if t.end is None else t.end) for t in changed])
        del self._start, self._end, self._tracked, self._lazy, self._modules, self._where

    def restore_attributes(self) -> None:
        """Within a pass: gives attributes, lists and counters what they began with; tensors that are in use stay."""
        self._start.restore()

    def _is_copied(self, tracked: _Tracked) -> bool:
        """Whether it is copied in every step."""
        # Of a frozen backbone there may be many.
        is_watched = tracked.kind == "parameter" and (self._has_observed_a_pass or not self._compares_others)
        return tracked.name in self._changing or (is_small(tracked.tensor) and not is_watched)

    def _kept_copy(self, tracked: _Tracked) -> Tensor | None:
        """The copy of a large tensor, an earlier step's if the tensor is as it was."""
        name, tensor = tracked.name, tracked.tensor
        kept = self._kept.get(name)
        if kept is not None and kept[0] is tensor and kept[1] == version(tensor):
            return kept[2]
        is_compared = not self._has_observed_a_pass and (tracked.kind != "parameter" or self._compares_others)
        if tracked.kind == "buffer" or is_compared:
            self._kept[name] = tensor, version(tensor), tensor.detach().clone()
            return self._kept[name][2]
        return None

    def _has_changed(self, tracked: _Tracked) -> bool:
        """Whether the first pass has changed it; notes what that says of later passes."""
        name = tracked.name
        if version(tracked.tensor) == tracked.version and name not in self._unseen:
            if self._has_observed_a_pass or self._is_as_it_was(tracked):
                return False
            self._unseen.add(name)
        if tracked.start is None and name:
            self.unguarded.append(name)
        elif tracked.kind == "parameter" and not self._has_observed_a_pass:
            self.teachers.append(name)
        self._changing.add(name)
        self._kept.pop(name, None)
        return True

    @staticmethod
    def _is_as_it_was(tracked: _Tracked) -> bool:
        if tracked.start is not None:
            return torch.equal(tracked.tensor, tracked.start)
        return tracked.checksum is None or torch.equal(_checksum(tracked.tensor), tracked.checksum)

    # Where state lies.

    def _tensors(self) -> Iterator[tuple[str, Tensor, str]]:
        """(name, tensor, buffer or attribute or parameter) of everything that has values of its own to keep."""
        for owner in self._where:
            for key, value in owner.tensors_within():
                if value.requires_grad or not _has_values(value):
                    continue
                if owner.is_buffers and not self._running_stats and is_running_statistic(key):
                    continue
                yield owner.prefix + key, value, "buffer" if owner.is_buffers else "attribute"
        moved = set(map(id, self._trained()))
        for prefix, module in self._modules:
            for key, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in moved and _has_values(parameter):
                    yield prefix + key, parameter, "parameter"

    def _find_owners(self) -> Iterator[Owner]:
        """Of the attributes of modules and of the objects that they hold, and of buffers."""
        met: set[int] = set()
        for prefix, module in self._modules:
            if isinstance(module, torch.jit.ScriptModule):
                yield Owner(prefix, dict(module.named_buffers(recurse=False)), is_buffers=True)
                continue
            if module._buffers and (self._running_stats or not all(map(is_running_statistic, module._buffers))):
                yield self._owner(prefix, module._buffers, is_buffers=True)
            if type(module).__module__.startswith(_SETTINGS_ONLY):
                continue
            owner = self._owner(prefix, vars(module))
            yield owner
            for key, value in owner.holders:
                yield from (self._owner(name, vars(held)) for name, held in objects_in(value, f"{prefix}{key}.", met))

    def _owner(self, prefix: str, attributes: MutableMapping[str, Any], is_buffers: bool = False) -> Owner:
        """The owner of these attributes: the one of an earlier step, if there is one."""
        owner = self._owners.get(id(attributes))
        if owner is None or owner.attributes is not attributes or owner.prefix != prefix:
            return Owner(prefix, attributes, is_buffers)
        owner.look()
        return owner


def is_running_statistic(name: str) -> bool:
    """Whether a buffer is a normalisation layer's running statistic, by torch's names."""
    return name.startswith("running_") or name == "num_batches_tracked"


def _checksum(tensor: Tensor) -> Tensor:
    """Of the tensor's bytes; another one tells a change, without a copy."""
    part = local_parts([tensor.detach()])[0].contiguous()
    return part.view(torch.uint8).sum(dtype=torch.int64) if part.ndim else part


def _has_values(tensor: Tensor) -> bool:
    """Whether it holds numbers that can be copied and written back."""
    return not is_lazy(tensor) and not tensor.is_inference() and tensor.layout == torch.strided


def _restore(values: list[tuple[Tensor, Tensor | None]]) -> None:
    """Writes each tensor's value, where there is one, into it."""
    known = [(tensor.detach(), value) for tensor, value in values if value is not None]
    copy_by_kind([value for _, value in known], [tensor for tensor, _ in known])
