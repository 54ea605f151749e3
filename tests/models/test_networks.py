"""The networks against what they claim to be."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18 as torchvision_resnet18

from sam_lightning.models import TrimmedConv2d, cifar_resnet, cifar_resnet18, digits_cnn, resnet18


def normalising(network):
    kinds = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)
    return [layer for layer in network.modules() if isinstance(layer, kinds)]


def test_the_studies_network_is_torchvisions():
    torch.manual_seed(20)
    ours = resnet18().state_dict()
    torch.manual_seed(20)
    theirs = torchvision_resnet18(weights=None).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours["fc.weight"].shape == (1000, 512)


def convolutions(size, layout=torch.contiguous_format, **options):
    """A convolution, the trimmed one with its weights, and 20 images of some size."""
    torch.manual_seed(0)
    whole, trimmed = (make(4, 6, **options).to(memory_format=layout) for make in (nn.Conv2d, TrimmedConv2d))
    trimmed.load_state_dict(whole.state_dict())
    return whole, trimmed, torch.randn(20, 4, *size, dtype=whole.weight.dtype).contiguous(memory_format=layout)


def derivatives(layer, x):
    """Output, gradients, and the gradients' derivatives along a direction."""
    x = x.clone().requires_grad_()
    output = layer(x)
    at = [x, *layer.parameters()]
    scale = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view(output.shape)
    first = torch.autograd.grad((output.sin() * scale).sum(), at, create_graph=True)
    second = torch.autograd.grad(first, at, [torch.ones_like(value) for value in at])
    return [value.detach() for value in (output, *first, *second)]


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])


@LAYOUTS
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 2), (1, 3), (1, 7), (4, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "padding"), [(1, 0), (3, 1), (5, 2), (3, 2)])
def test_a_trimmed_convolution_is_the_convolution(size, stride, kernel, padding, layout):
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "dtype": torch.float64}
    whole, trimmed, x = convolutions(size, layout, **options)
    expected, found = (derivatives(layer, x) for layer in (whole, trimmed))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("size", [1, 2])
def test_a_trimmed_convolution_loses_no_more_in_bfloat16(size, layout):
    whole, trimmed, x = convolutions((size, size), layout, kernel_size=3, padding=1)
    exact = derivatives(whole, x)[:3]
    with torch.autocast("cpu", torch.bfloat16):
        assert trimmed(x).dtype == torch.bfloat16
        rounded, found = (derivatives(layer, x)[:3] for layer in (whole, trimmed))
    for value, theirs, ours in zip(exact, rounded, found, strict=True):
        assert (ours - value).norm() < 1.5 * (theirs - value).norm()


@LAYOUTS
@pytest.mark.parametrize(
    ("size", "images", "most"),
    [(1, 3, 1 / 9), (2, 128, 0.52), (2, 3, 1)],  # a ninth; four ninths and the making of the matrix; left alone
)
def test_a_trimmed_convolution_does_less_work(size, images, most, layout):
    flops = []
    for layer in convolutions((size, size), layout, kernel_size=3, padding=1, bias=False)[:2]:
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(images, 4, size, size).contiguous(memory_format=layout)).sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[1] <= most * flops[0]


def test_on_another_device_the_part_of_the_kernel_that_meets_the_image_convolves():
    layer = TrimmedConv2d(4, 6, 3, padding=1, device="meta")
    for size, share in ((1, 1 / 9), (2, 1)):
        with FlopCounterMode(display=False) as counter:
            assert layer(torch.randn(20, 4, size, size, device="meta")).shape == (20, 6, size, size)
        assert counter.get_total_flops() == share * 2 * 20 * 4 * 6 * 9 * size**2


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((2, 2), {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "reflect"}),
        ((2, 2), {"kernel_size": 3, "padding": 1, "stride": 2, "padding_mode": "circular"}),
        ((3, 3), {"kernel_size": 3, "padding": 1, "stride": 3, "dilation": 2}),
        ((1, 1), {"kernel_size": 3, "padding": 1, "groups": 2}),
        ((1, 1), {"kernel_size": 1, "padding": 1, "stride": 3}),
        ((1, 1), {"kernel_size": 3, "padding": "same"}),
    ],
)
def test_what_cannot_be_trimmed_is_the_convolution(size, options):
    whole, trimmed, x = convolutions(size, **options)
    torch.testing.assert_close(trimmed(x), whole(x), rtol=0, atol=0)


def test_the_studies_network_is_torchvisions_with_less_arithmetic():
    images = torch.randn(32, 3, 32, 32)
    outputs, flops = [], []
    for make in (resnet18, torchvision_resnet18):
        torch.manual_seed(20)
        with FlopCounterMode(display=False) as counter:
            outputs.append(make()(images))
        flops.append(counter.get_total_flops())
    torch.testing.assert_close(outputs[0], outputs[1])
    assert flops[0] < 0.75 * flops[1]


def test_without_norm_only_the_head_has_a_bias():
    network = resnet18(norm="none")
    assert not normalising(network)
    assert [name for name, _ in network.named_parameters() if "bias" in name] == ["fc.bias"]
    torch.manual_seed(1)
    ours = resnet18(norm="none").state_dict()
    torch.manual_seed(1)
    theirs = torchvision_resnet18(weights=None, norm_layer=nn.Identity).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("norm", "kind", "count"), [("batch", nn.BatchNorm2d, 20), ("group", nn.GroupNorm, 20), ("none", nn.Module, 0)]
)
def test_cifar_form(norm, kind, count):
    network = cifar_resnet18(num_classes=7, norm=norm)
    assert len(normalising(network)) == count
    assert all(isinstance(layer, kind) for layer in normalising(network))
    sizes = []
    network.layer4.register_forward_hook(lambda layer, inputs, output: sizes.append(output.shape[-2:]))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(4, 4)]  # 32 halved by three stages, not by the stem
    # He initialisation by fan out, as the other convolutions: std = sqrt(2 / (9 * 64)).
    assert network.conv1.weight.std().item() == pytest.approx((2 / 576) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85), (110, 1.7)])
def test_thin_residual_networks_have_the_size_that_their_authors_give(depth, millions):  # He et al., table 6
    network = cifar_resnet(depth)
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(millions * 1e6, rel=0.03)
    weights = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert len(weights) == depth + 2  # and two shortcuts
    assert all(layer.bias is None for layer in weights[:-1])


@pytest.mark.parametrize(("stem_stride", "size"), [(1, 8), (2, 4)])
def test_thin_residual_networks_halve_the_image_at_every_stage(stem_stride, size):
    network = cifar_resnet(depth=8, width=4, stem_stride=stem_stride, num_classes=7)
    sizes = []
    network.pool.register_forward_hook(lambda layer, inputs, output: sizes.append(inputs[0].shape[1:]))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert sizes == [(16, size, size)]


@pytest.mark.parametrize("depth", [2, 18, 21])
def test_a_depth_that_no_thin_residual_network_has_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be 6 n \\+ 2, such as 8, 14 or 20, got {depth}"):
        cifar_resnet(depth)


def test_digits_network():
    network = digits_cnn()
    assert network(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert 20_000 < sum(p.numel() for p in network.parameters()) < 40_000


@pytest.mark.parametrize("make", [resnet18, cifar_resnet18])
def test_an_unknown_norm_is_refused(make):
    with pytest.raises(ValueError, match=r"norm must be one of .*'batch'.*, got 'layer'"):
        make(norm="layer")
    with pytest.raises(ValueError, match="got 'group'"):
        resnet18(norm="group")
