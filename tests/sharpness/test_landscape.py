"""Landscapes: directions by their definition, losses by hand, and a grid that goes on where it was."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from classifier import Classifier, batches, data
from commands import fails, fit
from regression import assert_same, state_of
from sam_lightning.cli import main
from sam_lightning.cli.landscape_figures import line, planes
from sam_lightning.runs.checkpoints import read_checkpoint
from sam_lightning.sharpness.landscape import direction_to, random_direction, scan

ABOUT = {"seed": 0}
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_filter_of_a_direction_has_its_weights_length():
    network = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))
    network[3].weight.data[1] = 0  # a dead filter has no length
    direction = random_direction(network, seed=1)
    for weight, d in zip(network.parameters(), direction, strict=True):
        assert d.shape == weight.shape
        for filter_, moved in zip(weight.detach(), d, strict=True):
            expected = filter_.norm() if weight.ndim > 1 else 0.0
            assert moved.norm().item() == pytest.approx(float(expected), rel=1e-5)
    again, other = random_direction(network, seed=1), random_direction(network, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(direction, again, strict=True))
    assert not torch.equal(direction[0], other[0])


def test_rescaled_networks_have_rescaled_directions():
    network, larger = nn.Linear(3, 2), nn.Linear(3, 2)
    larger.load_state_dict({name: 4 * value for name, value in network.state_dict().items()})
    torch.testing.assert_close(random_direction(larger, 0)[0], 4 * random_direction(network, 0)[0])


def test_a_step_of_one_arrives_at_the_other_solution():
    network, other = Classifier(seed=1), Classifier(seed=2)
    for name in ("frozen.weight", "frozen.bias"):  # what is not trained does not move
        other.get_parameter(name).data.copy_(network.get_parameter(name))
    direction = direction_to(network, other.state_dict())
    x, y = data()
    losses = scan(network, network.loss, batches(10), [direction], [[0, 0.5, 1]], Path("a.npz"), ABOUT)
    assert losses[0] == pytest.approx(network.loss((x, y)).item())
    assert losses[2] == pytest.approx(other.loss((x, y)).item())
    middle = [(a + b) / 2 for a, b in zip(network.trained().values(), other.trained().values(), strict=True)]
    assert losses[1] == pytest.approx(network.of((x, y))(middle).item())


def test_other_networks_are_refused():
    network = Classifier()
    with pytest.raises(ValueError, match=r"must have first\.weight of shape \(5, 4\), got shape \(3, 4\)"):
        direction_to(network, Classifier(hidden=3).state_dict())
    with pytest.raises(ValueError, match=r"must have first\.weight of shape \(5, 4\), got none"):
        direction_to(network, {})


def test_a_plane_is_the_loss_at_each_point():
    network = Classifier(norm=True)
    before = state_of(network)
    directions = [random_direction(network, seed) for seed in (0, 1)]
    axes = [[-1, 0, 1], [0, 0.5]]
    losses = scan(network.train(), network.loss, batches(10), directions, axes, Path("a.npz"), ABOUT)
    assert losses.shape == (3, 2)
    assert_same(state_of(network), before)
    assert network.training
    network.eval()
    for i, j in np.ndindex(3, 2):
        a, b = axes[0][i], axes[1][j]
        moved = [w + a * d + b * e for w, d, e in zip(network.trained().values(), *directions, strict=True)]
        assert losses[i, j] == pytest.approx(network.of(data())(moved).item())


def test_a_grid_that_was_stopped_goes_on_where_it_was():
    network = Classifier()
    directions, axes = [random_direction(network, 0)], [np.linspace(-1, 1, 5)]
    whole = scan(network, network.loss, batches(100), directions, axes, Path("whole.npz"), ABOUT)
    calls = []

    def stopping(batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return network.loss(batch)

    with pytest.raises(KeyboardInterrupt):
        scan(network, stopping, batches(100), directions, axes, Path("a.npz"), ABOUT)
    again = scan(network, stopping, batches(100), directions, axes, Path("a.npz"), ABOUT)
    assert len(calls) == 4 + 2  # three were known
    np.testing.assert_array_equal(again, whole)
    scan(network, stopping, batches(100), directions, axes, Path("a.npz"), ABOUT)
    assert len(calls) == 6


def test_a_grid_of_something_else_is_refused():
    network = Classifier()
    directions = [random_direction(network, 0)]
    scan(network, network.loss, batches(100), directions, [[0.0]], Path("a.npz"), ABOUT)
    for axes, about in (([[1.0]], ABOUT), ([[0.0]], {"seed": 1})):
        with pytest.raises(ValueError, match=r"a\.npz is of another scan"):
            scan(network, network.loss, batches(100), directions, axes, Path("a.npz"), about)


def test_figures_show_the_losses_and_say_what_they_are():
    panel = line([0, 1], np.array([2.0, 3.0]), "Step", "seed 7", ends=("SGD", "SAM")).axes[0]
    assert panel.lines[0].get_ydata().tolist() == [2.0, 3.0]
    assert panel.get_xlabel() == "Step"
    assert [text.get_text() for text in panel.texts] == ["SGD", "SAM"]
    figure = planes([[-1, 1], [-2, 0, 2]], {"SAM": np.array([[1.0, 2.0, 3.0], [4.0, np.nan, 6.0]])}, "seed 7")
    assert figure.get_supxlabel() == "seed 7"
    assert figure.axes[0].get_xlim() == (-1, 1)
    assert figure.axes[0].get_ylim() == (-2, 2)
    planes([[0, 1], [0, 1]], {"flat": np.ones((2, 2))}, "flat")


def test_planes_side_by_side_have_one_scale():
    low, high = np.array([[0.1, 1.0], [1.0, 2.0]]), np.array([[1.0, 5.0], [np.inf, 10.0]])
    figure = planes([[0, 1], [0, 1]], {"SGD": high, "SAM": low}, "both")
    *panels, bar = figure.axes
    assert [panel.get_title() for panel in panels] == ["SGD", "SAM"]
    filled = [panel.collections[0] for panel in panels]
    assert filled[0].levels.tolist() == filled[1].levels.tolist()
    assert (filled[0].levels[0], filled[0].levels[-1]) == pytest.approx((0.1, 10.0))
    assert {(contours.norm.vmin, contours.norm.vmax) for contours in filled} == {(0.1, filled[0].levels[-1])}
    assert bar.get_ylabel() == "Training loss"


def test_the_command_draws_around_beside_and_between_runs(capsys, monkeypatch):
    sam = fit("--trainer.default_root_dir", "sam")
    fit("--trainer.default_root_dir", "sgd", optimizer="sgd")
    words = ["landscape", "--ckpt_path", "sam", "--other", "sgd", "--points", "3", "--samples", "50", "--seed", "2"]
    drawn = main(words)
    out = capsys.readouterr().out
    for name in ("line", "plane", "between", "both"):
        assert f"sam/landscape-{name}.png\n" in out
        for kind in ("png", "pdf"):
            assert Path(f"sam/landscape-{name}.{kind}").stat().st_size > 0
    ((images, labels),) = sam.datamodule.training_sample(50, seed=2)
    module = drawn.model.eval()
    states = {run: read_checkpoint(Path(run, "checkpoints/last.ckpt"))["state_dict"] for run in ("sam", "sgd")}
    assert_same(state_of(module), states["sam"])  # as it was, though the other's was measured with it
    for name, state in (("plane", states["sam"]), ("plane-other", states["sgd"])):
        with np.load(f"sam/landscape-{name}.npz") as file:
            losses, identity = file["losses"], json.loads(str(file["identity"]))
        assert identity["seed"] == 2
        module.load_state_dict(state)
        with torch.no_grad():
            assert losses[1, 1] == pytest.approx(cross_entropy(module(images), labels).item(), rel=1e-5)
            directions = [random_direction(module, 2 + i) for i in (0, 1)]
            corner = [p + a + b for p, a, b in zip(module.parameters(), *directions, strict=True)]
            moved = functional_call(module, dict(zip(dict(module.named_parameters()), corner, strict=True)), images)
            assert losses[2, 2] == pytest.approx(cross_entropy(moved, labels).item(), rel=1e-4)
    monkeypatch.setattr("sam_lightning.cli.landscape.save", lambda figure, path: None)  # once will do
    main(words)  # all points are known
    assert "is of another scan" in fails(capsys, *words[:-1], "3")


def test_bad_values_are_refused(capsys):
    fit()
    for option, value in (("--points", "1"), ("--reach", "0"), ("--samples", "0")):
        assert f"{option} must be" in fails(capsys, "landscape", "--ckpt_path", "runs/digits-sam-seed1", option, value)
