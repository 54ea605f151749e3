"""The networks of the studies, from torchvision's building blocks."""

from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torchvision.models.resnet import BasicBlock, ResNet

Norm = Literal["batch", "group", "none"]

_NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(32, channels),
    "none": nn.Identity,
}


class TrimmedConv2d(nn.Conv2d):
    r"""A convolution that computes nothing with the zeros around an image of fewer pixels than the kernel.

    With stride s and padding p the output at position o is $y_{ko} = \sum_{ci} w_{kc,\,i - so + p} \, x_{ci}$, summed
    over the image's channels c and pixels i alone. A CPU computes it as one product with the matrix of these weights,
    (K positions, C pixels): on a 1x1 image a ninth of a 3x3 kernel's work, on a 2x2 image with stride 1 four ninths.
    Other devices convolve, with the part of the kernel that meets the image if there is one position only. For finite
    values the same numbers are added in another order.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, K, H', W'), as `torch.nn.Conv2d`."""
        taps, pixels = prod(self.kernel_size), input.shape[-2:].numel()
        is_plain = self.padding_mode == "zeros" and self.dilation == (1, 1) and self.groups == 1
        if isinstance(self.padding, str) or not is_plain or input.ndim < 4 or pixels >= taps:
            return super().forward(input)
        axes = list(zip(input.shape[-2:], self.kernel_size, self.stride, self.padding, strict=True))
        positions = [(size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in axes]
        if positions == [1, 1] and all(padding + size <= kernel for size, kernel, _, padding in axes):
            rows, columns = (slice(padding, padding + size) for size, _, _, padding in axes)
            if not input.is_cpu:
                return conv2d(input, self.weight[:, :, rows, columns], self.bias, self.stride)
            return self._product(input, positions, lambda weight: weight[:, rows, columns])
        # Where few images share the matrix, making it costs more than it saves.
        if not input.is_cpu or min(positions) < 1 or len(input) * (taps - pixels) < taps * pixels:
            return super().forward(input)
        meets = self._meets(axes, positions).to(self.weight.dtype)
        return self._product(input, positions, lambda weight: meets @ weight.flatten(1, 2))

    def _product(self, input: Tensor, positions: list[int], seen: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of (B, C, H, W); `seen` makes (K, positions pixels, C) of the weights (K, H, W, C)."""
        filters, count = len(self.weight), prod(positions)
        matrix = seen(self.weight.permute(0, 2, 3, 1)).reshape(filters, count, -1, input.shape[1])
        # In the order in which the weights lie in memory, else every gradient would be copied into it.
        if self.weight.is_contiguous():
            matrix = matrix.transpose(2, 3).reshape(filters * count, -1)
            output = linear(input.flatten(1), matrix).view(-1, filters, *positions)
        else:
            matrix = matrix.transpose(0, 1).reshape(count * filters, -1)
            output = linear(input.permute(0, 2, 3, 1).flatten(1), matrix).view(-1, *positions, filters)
            output = output.permute(0, 3, 1, 2)
        return output if self.bias is None else output + self.bias.to(output.dtype)[:, None, None]

    @staticmethod
    def _meets(axes: list[tuple[int, int, int, int]], positions: list[int]) -> Tensor:
        """Whether a tap of the kernel meets a pixel at a position: (positions pixels, taps)."""
        rows, columns = (
            torch.arange(kernel) == (torch.arange(size) - stride * torch.arange(count)[:, None] + padding)[..., None]
            for (size, kernel, stride, padding), count in zip(axes, positions, strict=True)
        )
        return torch.einsum("oit,pju->opijtu", rows.float(), columns.float()).flatten(0, 3).flatten(1)


def resnet18(num_classes: int = 1000, norm: Literal["batch", "none"] = "batch") -> ResNet:
    """Torchvision's ResNet-18 with the ImageNet stem, untrained: the network of the three studies.

    The stem (7x7, stride 2, then max-pool) halves a 32x32 image twice before the first block, so that the last
    blocks see 2x2 and 1x1 images; there the convolutions leave out the padding. With `norm="none"` no layer normalises,
    and the convolutions still have no bias.

    Args:
        num_classes: Size of the head; the studies keep ImageNet's 1000.
        norm: Normalisation layers: batch or none.

    Reference:
        He, Zhang, Ren, Sun. Deep Residual Learning for Image Recognition. CVPR 2016. arXiv 1512.03385.
    """
    network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes, norm_layer=_norm_layer(norm, "batch", "none"))
    for layer in (*network.layer3.modules(), *network.layer4.modules()):
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
