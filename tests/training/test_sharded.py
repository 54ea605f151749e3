"""FSDP2 in two gloo processes on the CPU, in plain PyTorch and in Lightning, against one process."""

import math
import re

import pytest
import torch

from cases import BASES, Net, displaced, every_case, every_two_pass_case, length, ready, several_groups, step
from launch import two_ranks
from regression import SAM_SGD, SGD, Tied, assert_same, bare_loop, loader, make_network, state_of
from sharded_worker import SAMPLES, SHORT, STEPS, TRAINED


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks ended with, for every case, from one launch."""
    return two_ranks("sharded_worker.py", tmp_path_factory.mktemp("ranks"))


# Plain PyTorch, in float64: each rank has half of the samples.


@pytest.mark.parametrize(("case", "base"), TRAINED, ids=lambda value: getattr(value, "name", value))
def test_the_optimizer_in_plain_pytorch_equals_one_process(ranks, case, base):
    net = Net()
    groups, *_ = several_groups(list(net.named_parameters()))
    optimizer = case.make(groups, BASES[base][0], rho=0.3)
    for _ in range(STEPS):
        step(optimizer, net)
    for rank in ranks:
        for sharded, whole in zip(rank["plain"]["trained"][case.name, base]["weights"], net.parameters(), strict=True):
            torch.testing.assert_close(sharded, whole.detach(), rtol=0, atol=1e-9)


@every_case
@pytest.mark.parametrize("on", [(), ("accelerator",)], ids=["cpu", "accelerator-branch"])
def test_the_norm_and_the_displacement_go_over_all_shards(ranks, case, on):
    net, optimizer = ready(case)
    norm = length([p.grad for p in net.parameters() if p.grad is not None])
    moved = displaced(optimizer, net)
    for rank in ranks:
        inside = rank["plain"]["inside"][case.name, True, *on]
        assert inside["norm"].item() == pytest.approx(norm, rel=1e-9)
        for sharded, whole in zip(inside["moved"], moved, strict=True):
            torch.testing.assert_close(sharded, whole, rtol=0, atol=1e-12)


@every_two_pass_case
@pytest.mark.parametrize("on", [(), ("accelerator",)], ids=["cpu", "accelerator-branch"])
def test_a_gradient_that_is_not_finite_in_one_shard_moves_none(ranks, case, on):
    for rank in ranks:
        inside = rank["plain"]["inside"][case.name, False, *on]
        assert math.isnan(inside["norm"].item())
        assert length(inside["moved"]) == 0


@pytest.mark.parametrize("method", ["SAM", "ASAM"])
def test_what_bfloat16_shards_lose_of_a_displacement_is_told_once_by_the_first_process(ranks, method):
    first, second = ([rank["plain"]["rounding"][method, rho] for rho in (1e-3, 5.0)] for rank in ranks)
    assert [len(found["told"]) for found in (*first, *second)] == [1, 0, 0, 0]
    assert first[0]["told"][0].startswith(f"{method}: weights in bfloat16")
    assert all(found["restored"] for found in (*first, *second))


@pytest.mark.parametrize("after", ["inside", "trained"])
def test_sharded_weights_are_restored_bit_for_bit(ranks, after):
    """After a pass that failed, and after those of a training."""
    for rank in ranks:
        assert [case for case, result in rank["plain"][after].items() if not result["restored"]] == []


# Lightning.


def assert_close(rank, network, atol=1e-6):
    for name, value in state_of(network).items():
        torch.testing.assert_close(rank["state"][f"network.{name}"].float(), value, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("sync", {}),
        ("accumulate", {}),
        ("clip", {"clip": 0.05}),
        ("sgd", {}),
        ("short-last", {}),
        ("own-cut", {}),
        ("tied", {}),
        ("bf16-mixed", {}),
        ("bf16-true", {}),
    ],
)
def test_sharded_ranks_equal_one_process_on_the_joined_batch(ranks, case, options):
    network = Tied() if case == "tied" else make_network(norm=False)
    optimizer = (SGD if case == "sgd" else SAM_SGD)(list(network.named_parameters()))
    bare_loop(network, optimizer, loader(batch_size=8, samples=SHORT if case == "short-last" else SAMPLES), **options)
    for rank in ranks:
        assert_close(rank[case], network, atol=0.05 if "bf16" in case else 1e-6)
        assert_same(rank[case]["state"], ranks[0][case]["state"])
        assert rank[case]["steps"] == 7
        for mine, first in zip(rank[case]["momenta"], ranks[0][case]["momenta"], strict=True):
            assert torch.equal(mine, first)
    assert ranks[1][case]["m"] == (None if case == "sgd" else 8)


def test_ranks_hold_and_validate_with_the_first_ones_running_statistics(ranks):
    assert ranks[0]["validated"]["network.1.running_mean"].abs().sum() > 0
    assert_same(ranks[0]["validated"], ranks[1]["validated"])
    assert_same(ranks[0]["norm"]["state"], ranks[1]["norm"]["state"])


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded-checkpoint", "single-file"])
def test_resume_is_bit_identical(ranks, distributed):
    for rank in ranks:
        straight, resumed = (rank["resume", distributed][which] for which in ("straight", "resumed"))
        assert rank["resume", distributed]["is_folder"] == distributed
        assert straight["steps"] == resumed["steps"] == 10
        assert straight["losses"][5:] == resumed["losses"]
        assert_same(straight["state"], resumed["state"])
        for a, b in zip(straight["momenta"], resumed["momenta"], strict=True):
            assert torch.equal(a, b)


def test_a_failed_second_pass_leaves_no_perturbed_weights_gathered(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["failed"]["computed"], rank["failed"]["expected"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("local", "sync_perturbation must be True in ModelParallelStrategy, got False"),
        ("half-sharded", "parameter scale is not sharded"),
        ("tensor-parallel", "tensor_parallel_size must be 1, got 2"),
        ("fp16", "precision 16-mixed does not work in ModelParallelStrategy"),
        ("static-local", r"sync_perturbation must be True in DDPStrategy with static_graph=True, got False"),
        ("static-accumulate", "micro_batches must be 1 in DDPStrategy with static_graph=True, got 2"),
        ("fsdp1", "strategy Fsdp1 does not work here: FSDP1 .* Use ModelParallelStrategy"),
        ("fsdp1-sgd", "strategy Fsdp1 does not work here: FSDP1 .* Use ModelParallelStrategy"),
    ],
)
def test_what_cannot_work_is_refused_by_name(ranks, case, message):
    for rank in ranks:
        assert re.match(f"StrategyError: {message}", rank["refused"][case]), rank["refused"][case]
