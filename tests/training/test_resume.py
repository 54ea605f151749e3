"""Training goes on from wherever Lightning saves a checkpoint, as plain training does."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn

from plain_modules import RHO, Plain, batches, distance
from regression import SAM_SGD, Regression, loader
from sam_lightning import SAM
from sam_lightning.training import SharpnessAwareModule, SharpnessAwareTraining

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # other callbacks on purpose
    pytest.mark.filterwarnings("ignore:this checkpoint's run was ended within epoch"),
]


class Validated(Plain):
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))


def fit(trainer, folder, epochs, sharp=True, ckpt_path=None, callbacks=(), module=None, **options):
    module = module or Validated()
    saved = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **options.pop("saving", {}))
    callbacks = [*([SharpnessAwareTraining(SAM, rho=RHO)] if sharp else []), saved, *callbacks]
    made = trainer(max_epochs=epochs, callbacks=callbacks, enable_checkpointing=True, **options)
    made.fit(module, batches(), batches(), ckpt_path=ckpt_path)
    return made, module


PLACES = {
    "every-2-steps": ({"every_n_train_steps": 2}, {}),
    "every-3-steps": ({"every_n_train_steps": 3}, {}),
    "at-the-epochs-last-step": ({"every_n_train_steps": 4}, {}),
    "behind-validation": ({}, {}),
    "every-second-validation": ({}, {"check_val_every_n_epoch": 2}),
    "validation-within-epochs": ({}, {"val_check_interval": 0.5}),
    "epoch-end": ({"save_on_train_epoch_end": True}, {}),
}


@pytest.mark.parametrize("place", PLACES)
def test_every_checkpoint_is_accepted_and_goes_on_as_plain_training(trainer, tmp_path, place):
    saving, options = PLACES[place]
    ends = {}
    for sharp in (False, True):
        folder = tmp_path / str(sharp)
        fit(trainer, folder, 2, sharp, saving=saving, **options)
        for path in sorted(folder.glob("*.ckpt")):
            made, _ = fit(trainer, tmp_path / "again", 4, sharp, path, saving=saving, **options)
            ends.setdefault(path.name, []).append((made.global_step, made.current_epoch))
    assert ends
    for name, (plain, sharp) in ends.items():
        assert plain == sharp, name


def test_a_run_that_its_time_ended_can_be_gone_on_with(trainer, tmp_path):
    """`max_steps` here, in the middle of the second epoch, as `max_time` would."""
    fit(trainer, tmp_path, -1, saving={"save_last": True, "every_n_train_steps": 2}, max_steps=6)
    made, _ = fit(trainer, tmp_path / "again", 4, ckpt_path=tmp_path / "last.ckpt")
    assert made.global_step > 6
    assert made.current_epoch == 4


def test_a_checkpoint_with_another_radius_is_told_and_counts(trainer, tmp_path):
    fit(trainer, tmp_path, 1, saving={"save_on_train_epoch_end": True})
    other = SharpnessAwareTraining(SAM, rho=0.5)
    with pytest.warns(UserWarning, match=r"rho is 0.05 in the checkpoint and 0.5 here: .* the checkpoint's"):
        made, _ = fit(trainer, tmp_path / "again", 2, False, tmp_path / "step=4.ckpt", callbacks=[other])
    assert made.optimizers[0].param_groups[0]["rho"] == RHO


def test_steps_go_on_being_counted_behind_plain_ones(trainer, tmp_path):
    fit(trainer, tmp_path, 1, sharp=False, saving={"save_on_train_epoch_end": True})
    made, _ = fit(trainer, tmp_path / "again", 2, ckpt_path=tmp_path / "step=4.ckpt")
    assert made.global_step == 8


def test_a_checkpoint_is_the_plain_modules(trainer, tmp_path):
    class Own(Validated):
        def __init__(self, width=1):
            super().__init__()
            self.save_hyperparameters()

    _, trained = fit(trainer, tmp_path, 1, module=Own(), saving={"save_on_train_epoch_end": True})
    path = tmp_path / "step=4.ckpt"
    assert distance(Own.load_from_checkpoint(path, weights_only=True), trained) == 0
    plain, _ = fit(trainer, tmp_path / "again", 2, sharp=False, ckpt_path=path)  # and training goes on plainly
    assert plain.global_step == 8


def test_functions_that_make_optimizers_stay_out_of_checkpoints(trainer, tmp_path):
    class Saved(SharpnessAwareModule):
        def __init__(self, optimizer=None, width=1):
            super().__init__(optimizer=optimizer)
            self.save_hyperparameters()
            self.net = nn.Linear(4, width).double()

        training_step = Plain.training_step

    class Named(Saved):
        def __init__(self, optimizer="adam"):
            super().__init__()
            self.save_hyperparameters()

    make = partial(SAM, base=partial(torch.optim.SGD, lr=0.1), rho=RHO)
    saved = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True, filename="{step}")
    trainer(callbacks=[saved], enable_checkpointing=True).fit(Saved(make), batches())
    path = tmp_path / "step=4.ckpt"
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"width": 1}
    assert Saved.load_from_checkpoint(path, weights_only=True).hparams["width"] == 1
    made = trainer(max_epochs=2)
    made.fit(Saved(make), batches(), ckpt_path=path, weights_only=True)
    assert made.global_step == 8
    assert Named().hparams["optimizer"] == "adam"


class Backbone(Validated):
    def __init__(self, named=False):
        super().__init__()
        self.backbone = nn.Linear(4, 4).double()
        self.named = named

    def training_step(self, batch, batch_idx):
        return super().training_step((self.backbone(batch[0]), batch[1]), batch_idx)

    def configure_optimizers(self):
        named = self.named_parameters() if self.named else ((None, p) for p in self.parameters())
        weights = [(n, p) if self.named else p for n, p in named if p.requires_grad]
        return torch.optim.SGD(weights, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("method", ["SAM", "ASAM"])
def test_finetuning_thaws_and_resumes(trainer, tmp_path, method):
    def run(epochs, ckpt_path=None):
        thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_ratio_lr=0.1)
        saved = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        sharp = SharpnessAwareTraining(method)
        module = Backbone()
        made = trainer(max_epochs=epochs, callbacks=[thaw, sharp, saved], enable_checkpointing=True)
        made.fit(module, batches(), ckpt_path=ckpt_path)
        return made, module

    straight, resumed = run(4), run(4, tmp_path / "epoch=2.ckpt")
    assert straight[0].global_step == resumed[0].global_step == 16
    groups = resumed[0].optimizers[0].param_groups
    assert len(groups) == 2
    assert {group["rho"] for group in groups} == {0.05 if method == "SAM" else 0.5}


def test_the_learning_rate_finder_finds_and_leaves_nothing_behind(trainer, tmp_path):
    class Own(SharpnessAwareModule):
        rho = RHO

        def __init__(self):
            super().__init__()
            self.lr = 0.1
            self.net = Plain().net

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        training_step = Plain.training_step

    module = Own()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    made = trainer(default_root_dir=tmp_path, max_epochs=10)
    found = Tuner(made).lr_find(module, batches(), num_training=20)
    assert len(found.results["lr"]) == 20
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in before.items())
    assert not list(tmp_path.glob("*.ckpt"))
    assert not {"log", "is_second_pass"} & vars(module).keys()
    assert "_make_closure" not in vars(made.fit_loop.epoch_loop.automatic_optimization)
    assert not module._state_dict_pre_hooks
    made.fit(module, batches())
    assert type(made.optimizers[0]) is SAM


def test_the_losses_of_an_epoch_are_kept_as_one_number(trainer, tmp_path):
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="{step}", save_top_k=-1)
    trainer(callbacks=[saved], enable_checkpointing=True).fit(Regression(SAM_SGD), loader())
    states = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["callbacks"]
    (state,) = [state for name, state in states.items() if "SharpnessAwareTraining" in name]
    assert state.keys() == {"loss_sum", "batches"}
    assert state["batches"] == 6
