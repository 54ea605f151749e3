"""Two gloo processes on the CPU in DistributedDataParallel, against written-out references in one process."""

import pytest
import torch
from torch.nn.functional import mse_loss

from cases import every_case
from distributed_worker import SAMPLES, SHORT
from launch import two_ranks
from regression import SAM_SGD, SGD, Branches, assert_same, bare_loop, loader, make_data, make_network, state_of

MODES = ("sync", "local")
USED = {  # whether rank and pass take the second branch
    "one-rank": lambda rank, second: rank == 0,
    "first-pass": lambda rank, second: not second,
    "first-pass-of-one-rank": lambda rank, second: rank == 0 and not second,
    "never": lambda rank, second: False,
}
OVERFLOWS = [f"{mode}-overflow-{n}" for mode in MODES for n in (1, 2)]
PRECISIONS = [f"{mode}-{precision}" for mode in MODES for precision in ("bf16-mixed", "bf16-true")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks ended with, for every case, from one launch."""
    return two_ranks("distributed_worker.py", tmp_path_factory.mktemp("ranks"), "cpu")


def joined_batches(samples=SAMPLES):
    """What both ranks see in a step: their samples are interleaved, so it is 8 in a row."""
    return loader(batch_size=8, samples=samples)


def halves(batches):
    return [[(x[rank::2], y[rank::2]) for rank in range(2)] for x, y in batches]


def ragged_halves():
    """As in the worker: the ranks' last batches have 3 samples and 1."""
    x, y = make_data(48).tensors
    last = [(x[44:47], y[44:47]), (x[47:], y[47:])]
    return [*halves((x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)), last]


def two_rank_loop(network, optimizer, steps, local, used=None, clip=None):
    """Written out: each rank's loss is its mean, and the ranks' gradients are averaged.

    With the local perturbation each rank climbs along its own gradient, and the mean of the two perturbed
    gradients descends: m-sharpness.
    """
    parameters = list(network.parameters())

    def backward(of, second):
        optimizer.zero_grad()
        for rank, (x, y) in of:
            network.takes_second = used is None or used(rank, second)
            (mse_loss(network(x), y) / len(of)).backward()

    for step in steps:
        gradients, had_one = [], [False] * len(parameters)
        for of in [[pair] for pair in enumerate(step)] if local else [list(enumerate(step))]:
            backward(of, second=False)
            had_one = [had or (local and p.grad is not None) for had, p in zip(had_one, parameters, strict=True)]
            with optimizer.perturbed():
                backward(of, second=True)
            had_one = [had or p.grad is not None for had, p in zip(had_one, parameters, strict=True)]
            gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])
        for parameter, had, *of_ranks in zip(parameters, had_one, *gradients, strict=True):
            parameter.grad = sum(of_ranks) / len(of_ranks) if had else None
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()


def assert_close(rank, network, atol=1e-6):
    for name, value in state_of(network).items():
        torch.testing.assert_close(rank["state"][f"network.{name}"], value, rtol=0, atol=atol)


@pytest.mark.parametrize("case", ["sync", "sync-accumulate", "sync-static", "sgd", "sgd-static"])
def test_synchronised_ranks_equal_one_process_on_the_joined_batch(ranks, case):
    network = make_network(norm=False)
    bare_loop(network, (SGD if "sgd" in case else SAM_SGD)(list(network.named_parameters())), joined_batches())
    assert_close(ranks[0][case], network)
    assert ranks[0][case]["steps"] == 7


@every_case
def test_every_method_in_two_processes_equals_one_on_the_joined_batch(ranks, case):
    network = make_network(norm=False)
    optimizer = case.make(list(network.named_parameters()), SGD)
    for x, y in joined_batches():
        optimizer.passes(lambda x=x, y=y: mse_loss(network(x), y))
        optimizer.step()
    assert_close(ranks[0][f"method-{case.name}"], network, atol=1e-5)


@pytest.mark.parametrize("case", ["local", "local-accumulate", "local-view-accumulate"])
def test_local_perturbation_equals_m_sharpness(ranks, case):
    network = make_network(norm=False)
    two_rank_loop(network, SAM_SGD(list(network.named_parameters())), halves(joined_batches()), local=True)
    assert_close(ranks[0][case], network)
    with pytest.raises(AssertionError):  # the synchronised perturbation is another method
        assert_close(ranks[0]["sync"], network, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_as_views_into_buckets(ranks, mode):
    network = make_network(norm=False)
    optimizer = SAM_SGD(list(network.named_parameters()))
    two_rank_loop(network, optimizer, halves(joined_batches()), mode == "local", clip=0.5)
    assert_close(ranks[0][f"{mode}-view"], network)


@pytest.mark.parametrize("mode", MODES)
def test_an_incomplete_last_batch(ranks, mode):
    network = make_network(norm=False)
    optimizer = SAM_SGD(list(network.named_parameters()))
    two_rank_loop(network, optimizer, halves(joined_batches(SHORT)), mode == "local")
    assert_close(ranks[0][f"{mode}-short-last"], network)


@pytest.mark.parametrize("mode", MODES)
def test_last_batches_of_different_length(ranks, mode):
    """Cut into 2 micro-batches on one rank and into 1 on the other."""
    network = make_network(norm=False)
    two_rank_loop(network, SAM_SGD(list(network.named_parameters())), ragged_halves(), mode == "local")
    assert_close(ranks[0][f"{mode}-ragged-last"], network)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("used", USED)
def test_parameters_without_a_gradient(ranks, mode, used):
    """On one rank, in one pass, or ever: one that a local first pass used ends with a zero gradient, not none."""
    network = Branches()
    optimizer = SAM_SGD(list(network.named_parameters()))
    two_rank_loop(network, optimizer, halves(joined_batches()), mode == "local", USED[used])
    assert_close(ranks[0][f"{mode}-{used}"], network)
    start, end = Branches().second.weight, ranks[0][f"{mode}-{used}"]["state"]["network.second.weight"]
    is_stepped = used == "one-rank" or (mode == "local" and used != "never")
    assert torch.equal(start, end) != is_stepped


def test_ranks_hold_the_same_weights_and_optimizer_state(ranks):
    cases = [name for name, result in ranks[0].items() if isinstance(result, dict)]
    assert len(cases) > 30
    for case in cases:
        a, b = (
            {k: v for k, v in rank[case]["state"].items() if "running" not in k and "tracked" not in k}
            for rank in ranks
        )
        assert_same(a, b)
        for index, state in ranks[0][case]["optimizer"].items():
            other = ranks[1][case]["optimizer"][index]
            assert torch.equal(state["momentum_buffer"], other["momentum_buffer"]), case


@pytest.mark.parametrize(
    ("case", "per_step"),
    [
        ("sgd", 1),
        ("local", 1),
        ("local-accumulate", 1),
        ("local-view-accumulate", 1),
        ("local-ragged-last", 1),
        ("local-first-pass", 1),
        ("sync", 2),
        ("sync-accumulate", 2),
        ("sync-ragged-last", 2),
        ("sync-static", 2),
    ],
)
def test_gradients_are_averaged_once_per_synchronised_pass(ranks, case, per_step):
    assert ranks[0][case]["reductions"] == per_step * ranks[0][case]["steps"]  # of one bucket


def test_m_is_the_number_of_samples_that_share_a_perturbation(ranks):
    assert {case: ranks[1][case]["m"] for case in ("sync", "local", "local-accumulate", "sgd")} == {
        "sync": 8,
        "local": 4,
        "local-accumulate": 4,
        "sgd": None,
    }


@pytest.mark.parametrize("case", ["norm", "norm-test", "norm-predict"])
def test_ranks_evaluate_with_the_same_running_statistics(ranks, case):
    assert_same(ranks[0][case]["validated"], ranks[1][case]["validated"])
    assert ranks[0][case]["validated"]["network.1.running_mean"].abs().sum() > 0


def check_joined_statistics(ranks):
    """The network ends as one process's with BatchNorm over the joined batch, running statistics included."""
    network = make_network()
    bare_loop(network, SAM_SGD(list(network.named_parameters())), joined_batches())
    assert_close(ranks[0]["sync-norm"], network, atol=1e-5)
    assert_same(ranks[0]["sync-norm"]["state"], ranks[1]["sync-norm"]["state"])


def test_synchronised_normalisation_equals_one_process(ranks):
    """By a layer of the tests' own: torch's SyncBatchNorm runs on GPUs only."""
    check_joined_statistics(ranks)
    assert ranks[0]["sync-batch-norm"] == "SyncBatchNorm layers only work with GPU modules"  # converted, then refused


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sync_batch_norm_equals_one_process(tmp_path):
    check_joined_statistics(two_ranks("distributed_worker.py", tmp_path, "gpu"))


@pytest.mark.parametrize("case", OVERFLOWS)
def test_an_overflow_on_one_rank_in_either_pass_skips_the_step_on_all(ranks, case):
    for rank in ranks:
        after = rank[case]["after"]
        assert torch.equal(after[2], after[1])
        assert not torch.equal(after[3], after[2])
        assert rank[case]["scale"] == 512


@pytest.mark.parametrize("case", PRECISIONS)
def test_bfloat16_follows_float32(ranks, case):
    network = make_network(norm=False)
    optimizer = SAM_SGD(list(network.named_parameters()))
    two_rank_loop(network, optimizer, halves(joined_batches()), "local" in case)
    state = ranks[0][case]["state"]
    assert {value.dtype for value in state.values()} == {torch.bfloat16 if "true" in case else torch.float32}
    for name, value in state_of(network).items():
        torch.testing.assert_close(state[f"network.{name}"].float(), value, rtol=0, atol=0.05)
