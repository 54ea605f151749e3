"""Arithmetic on lists of tensors, plain or sharded, such as gradients and perturbations. Knows torch only."""

from sam_lightning.tensors.norms import global_norm

__all__ = ["global_norm"]
