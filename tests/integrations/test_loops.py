"""Recipes for loops that are not Lightning's, each against the same loop with the two passes written out."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from sam_lightning import SAM
from written_out import random_states, seed, set_random_states, sharp_gradients

pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]

SIZES = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}  # of BERT


@pytest.fixture(autouse=True)
def _float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def network():
    seed(0)
    normalised = nn.Sequential(nn.Linear(12, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(nn.Flatten(), normalised, nn.Dropout(0.3), nn.Linear(8, 3))


@pytest.fixture
def batches():
    seed(1)
    return [(torch.rand(4, 3, 2, 2), torch.randint(3, (4,))) for _ in range(8)]


def assert_close(model, expected):
    for (name, here), there in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_fabric(batches):
    """Fabric's own example trains with Adadelta, whose decay is called `rho`."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision="64-true")
    net = network()
    expected = copy.deepcopy(net)
    seed(2)
    model, optimizer = fabric.setup(net, SAM(net.parameters(), torch.optim.Adadelta, lr=0.5, rho=0.05))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7)
    for x, y in batches:
        optimizer.passes(lambda x=x, y=y: cross_entropy(model(x), y), backward=fabric.backward, model=model)
        optimizer.step()
        schedule.step()

    seed(2)
    base = torch.optim.Adadelta(expected.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(base, step_size=3, gamma=0.7)
    for x, y in batches:
        sharp_gradients(expected, lambda net, x=x, y=y: [cross_entropy(net(x), y)])
        base.step()
        schedule.step()
    assert_close(net, expected)


def test_accelerate_with_an_adapter():
    """LoRA of peft: only the adapter is trained and perturbed; two micro-batches a step, clipping, warm-up."""
    accelerate = pytest.importorskip("accelerate")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    seed(0)
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)
    bert = transformers.BertForSequenceClassification(config)
    net = peft.get_peft_model(bert, peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.1))
    expected = copy.deepcopy(net)
    rows = [
        [{"input_ids": torch.randint(20, (4, 6)), "labels": torch.randint(2, (4,))} for _ in range(2)] for _ in range(6)
    ]

    seed(2)
    accelerator = accelerate.Accelerator(cpu=True)
    sam = SAM([p for p in net.parameters() if p.requires_grad], torch.optim.AdamW, lr=1e-2, rho=0.05)
    schedule = transformers.get_linear_schedule_with_warmup(sam, 2, 12)
    model, optimizer, schedule = accelerator.prepare(net, sam, schedule)
    for micro_batches in rows:

        def losses(micro_batches=micro_batches):
            for batch in micro_batches:
                yield model(**batch).loss / len(micro_batches)

        sam.passes(losses, backward=accelerator.backward, model=model)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    seed(2)
    base = torch.optim.AdamW([p for p in expected.parameters() if p.requires_grad], lr=1e-2)
    schedule = transformers.get_linear_schedule_with_warmup(base, 2, 12)
    for micro_batches in rows:
        sharp_gradients(expected, lambda net, mb=micro_batches: [net(**batch).loss / len(mb) for batch in mb])
        nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        base.step()
        schedule.step()
    assert_close(net, expected)
    assert accelerator.unwrap_model(model) is net


def test_timm_train_one_epoch(batches):
    """timm's loop: mixup, averaged weights, adaptive clipping, accumulation, a schedule that counts updates."""
    pytest.importorskip("timm")
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import ModelEmaV3, dispatch_clip_grad

    loss_fn, accumulated = SoftTargetCrossEntropy(), 2

    def train(model, make_sharp, passes):
        seed(2)
        mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)
        base = create_optimizer_v2(model, opt="adamw", lr=1e-2, weight_decay=0.05)
        optimizer = make_sharp(base)
        schedule = CosineLRScheduler(base, t_initial=4, warmup_t=2, warmup_lr_init=1e-3, t_in_epochs=False)
        average = ModelEmaV3(model, decay=0.9)
        updates, waiting = 0, []
        for x, y in batches:
            waiting.append(mixup(x.clone(), y))  # it mixes in place
            if len(waiting) < accumulated:
                continue
            passes(optimizer, model, waiting)
            dispatch_clip_grad(model.parameters(), 0.02, mode="agc")
            optimizer.step()
            updates, waiting = updates + 1, []
            average.update(model, step=updates)
            schedule.step_update(num_updates=updates)
            optimizer.zero_grad()
        return average.module

    def with_sam(optimizer, model, waiting):
        def losses():
            for x, y in waiting:
                yield loss_fn(model(x), y) / accumulated

        optimizer.passes(losses, model=model)

    def by_hand(optimizer, model, waiting):
        sharp_gradients(model, lambda net: [loss_fn(net(x), y) / accumulated for x, y in waiting])

    net = network()
    expected = copy.deepcopy(net)
    average = train(net, lambda base: SAM.around(base, rho=0.05), with_sam)
    expected_average = train(expected, lambda base: base, by_hand)
    assert_close(net, expected)
    assert_close(average, expected_average)


def test_two_optimizers_in_manual_optimization(batches, tmp_path):
    """A GAN: both networks climb, each in a step of its own."""
    from lightning.pytorch import LightningModule, Trainer

    softplus = nn.functional.softplus

    class GAN(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.generator = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 12))
            self.discriminator = nn.Sequential(nn.Linear(12, 8), nn.LeakyReLU(), nn.Dropout(0.3), nn.Linear(8, 1))

        def on_train_start(self):
            seed(2)  # the loader has drawn by now

        def of_generator(self, real):
            return softplus(-self.discriminator(self.generator(torch.randn(len(real), 4)))).mean()

        def of_discriminator(self, real):
            with torch.no_grad():
                fake = self.generator(torch.randn(len(real), 4))
            return softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(fake)).mean()

        def training_step(self, batch, batch_idx):
            real = batch[0].flatten(1)
            for optimizer, loss in zip(self.optimizers(), (self.of_generator, self.of_discriminator), strict=True):
                self.toggle_optimizer(optimizer)
                optimizer.passes(lambda loss=loss: loss(real), backward=self.manual_backward, model=self)
                optimizer.step()
                optimizer.zero_grad()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self):
            return [SAM(n.parameters(), torch.optim.Adam, lr=1e-2) for n in (self.generator, self.discriminator)]

    seed(0)
    gan = GAN()
    expected = copy.deepcopy(gan)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(gan, DataLoader(batches, batch_size=None))
    assert trainer.global_step == 16  # one for each network's step

    seed(2)
    adams = [torch.optim.Adam(n.parameters(), lr=1e-2) for n in (expected.generator, expected.discriminator)]
    for x, _ in batches:
        real = x.flatten(1)
        sharp_gradients(expected, lambda gan, real=real: [gan.of_generator(real)], lambda gan: gan.generator)
        adams[0].step()
        sharp_gradients(expected, lambda gan, real=real: [gan.of_discriminator(real)], lambda gan: gan.discriminator)
        adams[1].step()
    assert_close(gan, expected)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_hugging_face_trainer(accumulated, tmp_path):
    """Its Trainer makes optimizer and schedule, accumulates, clips and steps; only its training_step runs twice.

    Each of the accumulated batches climbs from the same w.
    """
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    config = transformers.BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES)
    rows = [{"input_ids": torch.randint(20, (6,)).tolist(), "labels": i % 2} for i in range(32)]

    class SharpTrainer(transformers.Trainer):
        def create_optimizer(self, *args):
            self.optimizer = SAM.around(super().create_optimizer(*args), rho=0.05)
            return self.optimizer

        def training_step(self, model, inputs, num_items_in_batch=None):
            step, done = super().training_step, lambda loss: None  # it has called backward itself
            before = [(p, p.grad) for p in model.parameters() if p.grad is not None]
            loss = self.optimizer.optimizer.passes(
                lambda: step(model, dict(inputs), num_items_in_batch), backward=done, model=model
            )
            for p, gradient in before:  # of the batches that this one is accumulated with
                p.grad = gradient if p.grad is None else p.grad + gradient
            return loss

    class WrittenOut(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            twin, states = copy.deepcopy(model), random_states()
            loss = super().training_step(model, dict(inputs), num_items_in_batch)
            after = random_states()
            norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
            with torch.no_grad():
                for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                    q.add_(0.05 * p.grad / norm)
            set_random_states(states)
            super().training_step(twin, dict(inputs), num_items_in_batch)
            set_random_states(after)
            for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
                p.grad = q.grad + before.get(name, 0)
            return loss

    def trained(cls):
        seed(0)
        model = transformers.BertForSequenceClassification(config).double()
        arguments = transformers.TrainingArguments(
            tmp_path / cls.__name__,
            num_train_epochs=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=accumulated,
            learning_rate=1e-2,
            warmup_steps=3,
            max_grad_norm=0.5,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
        )
        trainer = cls(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        return model, [row for row in trainer.state.log_history if "loss" in row]

    (model, logs), (expected, expected_logs) = trained(SharpTrainer), trained(WrittenOut)
    assert_close(model, expected)
    assert len(logs) == 16 // accumulated
    for row, there in zip(logs, expected_logs, strict=True):
        assert row["learning_rate"] == there["learning_rate"]
        assert row["loss"] == pytest.approx(there["loss"], abs=1e-3)  # rounded to four digits
