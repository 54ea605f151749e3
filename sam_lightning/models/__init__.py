"""The image classifier and the networks of the studies."""

from sam_lightning.models.classifier import ImageClassifier
from sam_lightning.models.networks import TrimmedConv2d, cifar_resnet, cifar_resnet18, digits_cnn, resnet18

__all__ = ["ImageClassifier", "TrimmedConv2d", "cifar_resnet", "cifar_resnet18", "digits_cnn", "resnet18"]
