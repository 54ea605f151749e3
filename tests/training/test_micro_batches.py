"""Cutting batches of any structure."""

from types import SimpleNamespace

import pytest
import torch

from sam_lightning.training.micro_batches import common_length, split_batch


def test_one_part_is_the_batch_itself():
    batch = object()
    assert split_batch(batch, 1) == [(batch, 1.0)]


@pytest.mark.parametrize(("count", "sizes"), [(2, [4, 3]), (3, [3, 2, 2]), (7, [1] * 7), (20, [1] * 7)])
def test_parts_and_shares(count, sizes):
    x, scalar = torch.arange(14).reshape(7, 2), torch.tensor(3.0)
    parts = split_batch({"x": x, "more": [x[:, 0], "name", scalar]}, count)
    assert [len(part["x"]) for part, _ in parts] == sizes
    assert [share for _, share in parts] == pytest.approx([size / 7 for size in sizes])
    assert torch.equal(torch.cat([part["x"] for part, _ in parts]), x)
    assert torch.equal(torch.cat([part["more"][0] for part, _ in parts]), x[:, 0])
    assert all(part["more"][1:] == ["name", scalar] for part, _ in parts)


def test_an_object_that_holds_tensors_is_cut_too():
    batch = SimpleNamespace(x=torch.arange(4), name="a")
    parts = split_batch(batch, 2)
    assert [(part.x.tolist(), part.name, share) for part, share in parts] == [([0, 1], "a", 0.5), ([2, 3], "a", 0.5)]
    assert len(batch.x) == 4


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(TypeError, match="there is none"):
        split_batch(["a", "b"], 2)
    with pytest.raises(ValueError, match=r"one length in a batch, got \[2, 3\]"):
        split_batch([torch.zeros(2), torch.zeros(3)], 2)


def test_a_list_that_may_hold_a_sample_in_each_tensor_is_refused():
    """Four sequences of ten would else be cut in time, without a word."""
    sequences = [torch.randn(10, 4) for _ in range(4)]
    with pytest.raises(TypeError, match=r"list of 4 tensors of 10 rows, which may be as many samples; .* split_batch"):
        split_batch(sequences, 2)
    assert common_length(sequences) is None
    assert common_length([torch.randn(10, 4), torch.randn(10)]) == 10  # images and labels, as they are collated


def test_a_module_may_cut_its_own_batches():
    class Own(torch.nn.Module):
        def split_batch(self, batch, count):
            return [(batch[i::count], len(batch[i::count]) / len(batch)) for i in range(count)]

    assert split_batch(list("abc"), 2, Own()) == [(["a", "c"], 2 / 3), (["b"], 1 / 3)]
