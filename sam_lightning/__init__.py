"""Sharpness-aware minimization for PyTorch and PyTorch Lightning.

Importing this package imports torch and never Lightning, which `sam_lightning.training` and the rooms above it need.
"""

from sam_lightning.optim import (
    ASAM,
    GSAM,
    MSAM,
    SAM,
    WSAM,
    FriendlySAM,
    LookSAM,
    SharpnessAware,
    VaSSO,
    norm_layers_only,
)

__all__ = [
    "ASAM",
    "GSAM",
    "MSAM",
    "SAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "SharpnessAware",
    "VaSSO",
    "norm_layers_only",
]
