"""Cutting batches of any structure."""

import pytest
import torch

from sam_lightning.training.micro_batches import split_batch


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


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(TypeError, match="there is none"):
        split_batch(["a", "b"], 2)
    with pytest.raises(ValueError, match=r"one length in a batch, got \[2, 3\]"):
        split_batch([torch.zeros(2), torch.zeros(3)], 2)
