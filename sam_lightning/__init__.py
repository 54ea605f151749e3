"""Sharpness-aware minimization for PyTorch and PyTorch Lightning.

Importing this package imports torch and never Lightning; the Lightning parts are
`sam_lightning.module`, `sam_lightning.classifier`, `sam_lightning.data` and `sam_lightning.cli`.
"""

from sam_lightning.optim import ASAM, SAM, SharpnessAware

__all__ = ["ASAM", "SAM", "SharpnessAware"]
