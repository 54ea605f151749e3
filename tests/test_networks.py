"""The networks against what they claim to be."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet18 as torchvision_resnet18

from sam_lightning.networks import cifar_resnet18, digits_cnn, resnet18


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
