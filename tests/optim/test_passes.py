"""One call that takes all passes of a step, against written-out loops."""

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from plain_modules import RHO, Plain, batches, distance, sharp_loop
from sam_lightning import ASAM, GSAM, MSAM, SAM


def train(module, method=SAM, micro=1, epochs=2, clip=None, **options):
    optimizer = method(module.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO)
    returned = []
    for _ in range(epochs):
        for x, y in batches():

            def losses(x=x, y=y):
                for xs, ys in zip(x.chunk(micro), y.chunk(micro), strict=True):
                    yield mse_loss(module.net(xs), ys) / micro

            returned.append(optimizer.passes(losses, model=module, **options).item())
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
    return returned


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_plain_loop_equals_the_written_out_one(micro, clip):
    """Dropout and BatchNorm would differ between micro-batches, as in every accumulation."""
    noisy = {"dropout": 0.3, "norm": True} if micro == 1 else {}
    module, expected = Plain(**noisy), Plain(**noisy)
    torch.manual_seed(5)
    train(module, micro=micro, clip=clip)
    torch.manual_seed(5)
    sharp_loop(expected, batches(), epochs=2, clip=clip)
    assert distance(module, expected) < 1e-14


def test_one_loss_instead_of_many_and_its_value():
    module = Plain()
    optimizer = SAM(module.parameters(), torch.optim.SGD, lr=0.1, rho=RHO)
    x, y = next(iter(batches()))
    expected = mse_loss(module.net(x), y).item()
    assert optimizer.passes(lambda: mse_loss(module.net(x), y), model=module).item() == expected
    with pytest.raises(ValueError, match="at least one, got none"):
        optimizer.passes(lambda: [], model=module)
    with pytest.raises(ValueError, match="second_pass must be 'replay' or 'fresh', got 'new'"):
        optimizer.passes(lambda: mse_loss(module.net(x), y), second_pass="new")


@pytest.mark.parametrize(("method", "passes"), [(SAM, 2), (ASAM, 2), (GSAM, 2), (MSAM, 1)])
def test_losses_are_called_once_a_pass(method, passes):
    module, calls = Plain(), []
    options = {"normalize_bias": True} if method is ASAM else {}
    optimizer = method(module.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=RHO, **options)
    for x, y in batches():

        def losses(x=x, y=y):
            calls.append(1)
            return mse_loss(module.net(x), y)

        optimizer.passes(losses, model=module)
        optimizer.step()
    assert len(calls) == 4 * passes
    optimizer.param_groups[0]["rho"] = 0.0
    calls.clear()
    optimizer.passes(losses, model=module)
    assert len(calls) == 1


def test_a_scaler_skips_a_step_whose_first_pass_overflowed():
    layer = nn.Linear(4, 1)
    optimizer = SAM(layer.parameters(), torch.optim.SGD, lr=0.1, rho=RHO)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = (t.float() for t in next(iter(batches())))
    for bad in (None, 0, 1):
        passes = []

        def losses(bad=bad, passes=passes):
            passes.append(1)
            loss = mse_loss(layer(x), y)
            return loss * float("inf") if len(passes) - 1 == bad else loss

        before = layer.weight.detach().clone()
        optimizer.passes(losses, model=layer, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, layer.weight) == (bad is not None)
    assert scaler.get_scale() == 256


def test_ones_own_backward():
    seen = []

    def backward(loss):
        seen.append(loss.item())
        loss.backward()

    module = Plain()
    train(module, epochs=1, backward=backward)
    assert len(seen) == 8


def test_a_group_may_be_empty():
    layer = nn.Linear(4, 1).double()
    optimizer = SAM([{"params": []}, {"params": list(layer.parameters())}], torch.optim.SGD, lr=0.1)
    x, y = next(iter(batches()))
    assert optimizer.passes(lambda: mse_loss(layer(x), y)) > 0


def test_a_method_with_one_pass_has_no_steps_to_leave_it_out():
    with pytest.raises(ValueError, match="MSAM takes no `every`"):
        MSAM(nn.Linear(2, 1).parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, every=2)
