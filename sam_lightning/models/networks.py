"""The networks of the studies, from torchvision's building blocks."""

from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import conv2d
from torchvision.models.resnet import BasicBlock, ResNet

Norm = Literal["batch", "group", "none"]

_NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(32, channels),
    "none": nn.Identity,
}


class TrimmedConv2d(nn.Conv2d):
    """A convolution that computes nothing with the zeros around an image, where it has one output position.

    There the kernel's first rows and columns lie on the padding, and those beyond the image do, too. For values that
    are finite they add exact zeros to the output and get a gradient of exact zeros, so that leaving them out changes
    only the order in which the others are added. On a 1x1 image a 3x3 kernel does a ninth of the work.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K, H', W'), as `torch.nn.Conv2d`."""
        if isinstance(self.padding, str) or self.padding_mode != "zeros" or self.dilation != (1, 1):
            return super().forward(input)
        axes = list(zip(input.shape[-2:], self.kernel_size, self.stride, self.padding, strict=True))
        if any(padding >= kernel or (size + 2 * padding - kernel) // stride for size, kernel, stride, padding in axes):
            return super().forward(input)
        rows, columns = (slice(padding, padding + size) for size, _, _, padding in axes)
        return conv2d(input, self.weight[:, :, rows, columns], self.bias, self.stride, groups=self.groups)


def resnet18(num_classes: int = 1000, norm: Literal["batch", "none"] = "batch") -> ResNet:
    """Torchvision's ResNet-18 with the ImageNet stem, untrained: the network of the three studies.

    The stem (7x7, stride 2, then max-pool) halves a 32x32 image twice before the first block, so that the last
    blocks see 1x1 images; there the convolutions leave out the padding. With `norm="none"` no layer normalises,
    and the convolutions still have no bias.

    Args:
        num_classes: Size of the head; the studies keep ImageNet's 1000.
        norm: Normalisation layers: batch or none.

    Reference:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv 1512.03385.
    """
    network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes, norm_layer=_norm_layer(norm, "batch", "none"))
    for layer in network.layer4.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = TrimmedConv2d  # with the weights that torchvision drew for it
    return network


def cifar_resnet18(num_classes: int = 10, norm: Norm = "batch") -> ResNet:
    """ResNet-18 for 32x32 images: 3x3 stem with stride 1, no max-pool.

    Args:
        num_classes: Size of the head.
        norm: Normalisation layers: batch, group (32 groups, no running statistics), or none.
    """
    network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes, norm_layer=_norm_layer(norm, *_NORMS))
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    network.maxpool = nn.Identity()
    return network


def cifar_resnet(depth: int = 20, width: int = 16, stem_stride: int = 1, num_classes: int = 10) -> nn.Sequential:
    """The thin residual networks for 32x32 images of He et al., section 4.2.

    A 3x3 stem, three stages of (depth - 2) / 6 basic blocks with `width`, 2 * `width` and 4 * `width` channels, and a
    linear head. Depth 20 and width 16 have 0.27 million parameters. Where the number of channels changes, the shortcut
    is a 1x1 convolution with batch normalisation, where the paper pads with zeros.

    Args:
        depth: Number of layers with weights on the longest path, 6 n + 2.
        width: Channels of the first stage.
        stem_stride: 1; with 2 every image within has half the height and width, and a pass costs about a quarter.
        num_classes: Size of the head.

    Raises:
        ValueError: If there is no network of that depth.

    Reference:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv 1512.03385.
    """
    blocks, remainder = divmod(depth - 2, 6)
    if blocks < 1 or remainder:
        raise ValueError(f"depth must be 6 n + 2, such as 8, 14 or 20, got {depth!r}.")
    layers: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False),
        "norm1": nn.BatchNorm2d(width),
        "relu1": nn.ReLU(inplace=True),
    }
    before = width
    for stage in range(3):
        after = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = None
            if before != after:
                shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            layers[f"stage{stage + 1}_block{block + 1}"] = BasicBlock(before, after, stride, shortcut)
            before = after
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(before, num_classes)}
    for layer in layers.values():
        for module in layer.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
    return nn.Sequential(OrderedDict(layers))


def digits_cnn(num_classes: int = 10, width: int = 32) -> nn.Sequential:
    """A small convolutional network with batch normalisation for 8x8 digits, about 30,000 parameters.

    Args:
        num_classes: Size of the head.
        width: Channels of the first convolution; the second has twice as many.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, width, 3, padding=1, bias=False),
            norm1=nn.BatchNorm2d(width),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            norm2=nn.BatchNorm2d(2 * width),
            relu2=nn.ReLU(),
            pool2=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(8 * width, num_classes),
        )
    )


def _norm_layer(norm: str, *allowed: str) -> type[nn.Module]:
    if norm not in allowed:
        raise ValueError(f"norm must be one of {allowed}, got {norm!r}.")
    return _NORMS[norm]  # type: ignore[return-value]  # ResNet wants any callable of a number of channels
