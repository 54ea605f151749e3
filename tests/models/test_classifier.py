"""ImageClassifier: its loss, its metrics against whole-set computations, and what it logs."""

import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sam_lightning import SAM
from sam_lightning.callbacks.sharpness_monitor import measure_module
from sam_lightning.data import Digits
from sam_lightning.models import ImageClassifier, digits_cnn
from sam_lightning.sharpness import Settings

OPTIMIZER = partial(SAM, base=partial(torch.optim.SGD, lr=0.1, momentum=0.9), rho=0.05)


def make(**options):
    torch.manual_seed(0)
    return ImageClassifier(digits_cnn(width=8), OPTIMIZER, **options)


def test_metrics_are_those_of_the_whole_set(trainer):
    data, module = Digits(batch_size=50), make()  # 360 test images: the last batch has 10
    (result,) = trainer().test(module, data, verbose=False)
    with torch.no_grad():
        logits = module.eval()(data.normalise(data._test.images))
    expected = torch.nn.functional.cross_entropy(logits, data._test.labels)
    assert result["test/loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["test/accuracy"] == pytest.approx((logits.argmax(1) == data._test.labels).double().mean().item())


def test_a_batch_that_is_not_a_number_is_not_left_out(trainer):
    class Broken(ImageClassifier):
        def forward(self, images):
            return super().forward(images) * (float("nan") if len(images) == 10 else 1)

    (result,) = trainer().test(Broken(digits_cnn(width=8), OPTIMIZER), Digits(batch_size=50), verbose=False)
    assert result["test/loss"] != result["test/loss"]


def test_label_smoothing_is_for_training_only():
    module = make(label_smoothing=0.2)
    x, y = torch.randn(6, 1, 8, 8), torch.arange(6)
    log_p = module(x).log_softmax(1)
    target = torch.full((6, 10), 0.2 / 10)
    target[torch.arange(6), y] += 0.8
    torch.testing.assert_close(module.training_step((x, y), 0), -(target * log_p).sum(1).mean())
    module._evaluate((x, y))
    torch.testing.assert_close(module.eval_loss.compute(), -log_p[torch.arange(6), y].mean())


def test_training_learns_and_logs_by_name(trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run = trainer(max_epochs=3, logger=logger, log_every_n_steps=7)
    run.fit(make(), Digits(seed=1))
    assert run.callback_metrics["val/accuracy"] > 0.9
    events = EventAccumulator(str(tmp_path)).Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    every_seventh = list(range(6, 63, 7))  # 3 epochs of 21 steps; Lightning counts from 0
    for tag in ("train/loss", "train/loss_perturbed", "train/grad_norm", "lr"):
        assert steps[tag] == every_seventh, tag
    for tag in ("train/loss_epoch", "val/loss", "val/accuracy"):
        assert steps[tag] == [20, 41, 62], tag
    assert {"train/loss", "val/loss", "val/accuracy"} <= run.progress_bar_metrics.keys()


def test_predictions_are_probabilities(trainer):
    batches = trainer().predict(make(), Digits())
    probabilities = torch.cat(batches)
    assert probabilities.shape == (360, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(360))


@pytest.mark.parametrize("bad", [-0.1, 1.0])
def test_label_smoothing_is_checked(bad):
    with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\), got {bad}"):
        make(label_smoothing=bad)


def test_the_precision_of_the_trainer_reaches_the_images(trainer):
    class Watching(ImageClassifier):
        def training_step(self, batch, batch_idx):
            seen.append(batch[0].dtype)
            return super().training_step(batch, batch_idx)

    for precision, dtype in (("32-true", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)):
        seen = []
        trainer(precision=precision, max_steps=2).fit(Watching(digits_cnn(width=8), OPTIMIZER), Digits())
        assert set(seen) == {dtype}


def weights_after_an_epoch(trainer, **options):
    module = make(**options)
    trainer(max_epochs=1, limit_train_batches=5).fit(module, Digits(seed=1))
    return module, torch.cat([p.detach().flatten() for p in module.network.parameters()])


def test_channels_last_changes_the_layout_and_not_the_training(trainer):
    seen = []
    _, plain = weights_after_an_epoch(trainer)
    module, found = weights_after_an_epoch(trainer, channels_last=True)
    module.network.conv2.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    module(torch.randn(2, 1, 8, 8))
    weight = module.network.conv2.weight
    for tensor in (seen[0], weight, module.optimizers().state[weight]["momentum_buffer"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]
)  # the default one, and one that makes the same programs and leaves them in Python
def test_a_compiled_network_trains_alike_under_the_same_names_and_can_be_measured(trainer, monkeypatch, backend):
    _, plain = weights_after_an_epoch(trainer)
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    module, found = weights_after_an_epoch(trainer, compile_network=True)
    # Training, validation and its last batch: the perturbed pass is no program of its own.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
    assert module.state_dict().keys() == make().state_dict().keys()
    batch = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    assert (
        measure_module(module, [batch], Settings()).rows() == measure_module(loaded(module), [batch], Settings()).rows()
    )


@pytest.mark.parametrize(
    ("micro_batches", "options"),
    [
        (2, {}),
        (1, {"accumulate_grad_batches": 2}),
        (1, {"callbacks": [GradientAccumulationScheduler({1: 2})], "limit_train_batches": 1}),
    ],
    ids=["micro-batches", "accumulated", "accumulated-later"],
)
def test_a_cuda_graph_takes_no_accumulated_gradients(trainer, micro_batches, options):
    module = make(compile_network="reduce-overhead", micro_batches=micro_batches)
    module.network.compile(backend="eager")  # what is refused is not compiled here
    with pytest.raises(ValueError, match="reduce-overhead does not accumulate gradients: set it to true, or"):
        trainer(max_epochs=2, **options).fit(module, Digits())


def test_an_unknown_way_to_compile_is_refused():
    with pytest.raises(ValueError, match="compile_network must be true, false or reduce-overhead, got 'fast'"):
        make(compile_network="fast")


def loaded(module):
    other = make()
    other.load_state_dict(module.state_dict())
    return other
