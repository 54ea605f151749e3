"""Weights in bfloat16 and half precision: nothing drifts, and norms are summed in float32."""

from functools import partial

import pytest
import torch

from regression import SAM_SGD, SGD, Regression, assert_same, bare_loop, loader, make_network, state_of
from sam_lightning import ASAM, SAM


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for one another on busy cores would take ten times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("precision", "dtype", "optimizer"),
    [("bf16-true", torch.bfloat16, SAM), ("bf16-true", torch.bfloat16, ASAM), ("16-true", torch.half, SAM)],
)
def test_steps_at_learning_rate_zero_change_no_bit(trainer, precision, dtype, optimizer):
    steps = 20
    module = Regression(partial(optimizer, base=partial(torch.optim.SGD, lr=0.0), rho=0.5))
    before = state_of(module.to(dtype))
    fit = trainer(precision=precision)
    fit.fit(module, loader(batch_size=2, samples=2 * steps))
    assert fit.global_step == steps
    for name, parameter in module.named_parameters():
        assert parameter.dtype is dtype
        assert torch.equal(parameter.detach(), before[name]), name


@pytest.mark.parametrize("optimizer", [SGD, SAM_SGD], ids=["sgd", "sam"])
def test_bf16_weights_train_as_in_the_bare_loop(trainer, optimizer):
    module = Regression(optimizer)
    trainer(precision="bf16-true").fit(module, loader())
    network = make_network().bfloat16()
    batches = [(x.bfloat16(), y.bfloat16()) for x, y in loader()]
    bare_loop(network, optimizer(list(network.named_parameters())), batches)
    assert_same(state_of(module.network), state_of(network))


def test_training_tells_once_what_rounding_leaves_of_the_displacement(trainer):
    with pytest.warns(
        UserWarning, match=r"SAM: weights in bfloat16 round .* of \|\|e\|\| = 0.001.*bf16-mixed"
    ) as found:
        trainer(precision="bf16-true").fit(Regression(partial(SAM, base=SGD, rho=1e-3)), loader())
    assert sum("round the displacement" in str(warning.message) for warning in found) == 1
    trainer(precision="bf16-mixed").fit(Regression(partial(SAM, base=SGD, rho=1e-3)), loader())  # a warning is an error
