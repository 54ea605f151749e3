"""Data modules: CIFAR-10 and the embedded handwritten digits."""

from sam_lightning.data.cifar10 import CIFAR10, DataError
from sam_lightning.data.datamodule import ImageData
from sam_lightning.data.digits import Digits

__all__ = ["CIFAR10", "DataError", "Digits", "ImageData"]
