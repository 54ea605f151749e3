"""The copies of the weights that each method's docstring names are what a step takes."""

import re
from functools import partial

import pytest
import torch

from sam_lightning import ASAM, GSAM, MSAM, SAM, WSAM, FriendlySAM, LookSAM, VaSSO
from step_memory import peak

SGD = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
COPIES = {"one": 1, "two": 2, "three": 3, "four": 4}


@pytest.fixture(scope="module")
def of_sgd():
    return peak(lambda net: SGD(net.parameters()))


def test_sgd_has_a_gradient_and_a_momentum(of_sgd):
    assert 2 <= of_sgd < 2.05


@pytest.mark.parametrize("method", [SAM, ASAM, MSAM, WSAM, GSAM, FriendlySAM, LookSAM, VaSSO])
def test_a_step_takes_the_copies_that_are_documented(method, of_sgd):
    said = COPIES[re.search(r"(\w+)\s+cop(?:y|ies) of\s+the\s+weights", method.__doc__).group(1)]
    more = peak(lambda net: method(net.named_parameters(), SGD)) - of_sgd
    assert said <= more < said + 0.3  # a list of tensors is worked on one tensor at a time
