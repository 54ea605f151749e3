"""Sharpness-aware minimization for PyTorch and PyTorch Lightning.

Importing this package imports torch and never Lightning; what needs Lightning lies in the rooms beside `optim` and
`sharpness`, `sam_lightning.training` first of all.
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
