"""The configuration files: complete blocks, the paper's values, and every arm trains."""

from pathlib import Path

import pytest
import yaml
from torch import nn

from sam_lightning.cli import main

ROOT = Path(__file__).parents[1]
OPTIMIZERS = sorted((ROOT / "configs/optimizers").glob("*.yaml"))
QUICK = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]

SGD = {"lr": 0.01, "weight_decay": 5e-4, "momentum": 0.0}
# What the paper's code and logs show, arm by arm: (layer, optimizer, overrides) -> expected.
SHARED = {"num_classes": 1000, "stats": "both", "crop": False, "flip": False, "validation": "test", "smoothing": 0.0}
AB = {**SHARED, "epochs": 100, "scheduler": None, "normalisation": "half", "norms": 20, "sgd": SGD}
C = {**SHARED, "epochs": 200, "scheduler": 200, "normalisation": "unit", "norms": 0, "sgd": {**SGD, "momentum": 0.9}}
ARMS = {
    "A-sgd": ("ab", "paper-sgd", [], {**AB, "batch": 128, "rho": None}),
    "A-sam": ("ab", "paper-sam", [], {**AB, "batch": 128, "rho": 0.05}),
    "B-16-sgd": ("ab", "paper-sgd", ["--data.batch_size", "16"], {**AB, "batch": 16, "rho": None}),
    "B-64-sam": ("ab", "paper-sam", ["--data.batch_size", "64"], {**AB, "batch": 64, "rho": 0.05}),
    "C-sam": ("c", "paper-sam-momentum", [], {**C, "batch": 128, "rho": 0.05}),
    "C-asam": ("c", "paper-asam-momentum", [], {**C, "batch": 128, "rho": 0.5, "eta": 0.0, "bias": True}),
    "C-asam-batchnorm": (
        "c",
        "paper-asam-momentum",
        ["--model.network.init_args.norm", "batch"],
        {**C, "batch": 128, "rho": 0.5, "eta": 0.0, "bias": True, "norms": 20},
    ),
}


def run(layer, optimizer, *more):
    layers = ["-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/{layer}.yaml"]
    return main(["fit", *layers, "--model.optimizer", str(optimizer), *QUICK, *more])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("arm", ARMS)
def test_the_papers_arms_train_with_its_values(arm, fake_cifar10):
    layer, optimizer, more, expected = ARMS[arm]
    cli = run(f"paper/{layer}", ROOT / f"configs/optimizers/{optimizer}.yaml", "--data.root", str(fake_cifar10), *more)
    trained = cli.trainer.optimizers[0]
    base = getattr(trained, "base", trained)
    data, module = cli.datamodule, cli.model
    scheduler = cli.trainer.lr_scheduler_configs
    found = {
        "num_classes": module.network.fc.out_features,
        "stats": module.batch_norm_stats,
        "crop": data.random_crop,
        "flip": data.horizontal_flip,
        "validation": data.validation,
        "normalisation": data.normalisation,
        "batch": data.batch_size,
        "smoothing": module.label_smoothing,
        "norms": sum(isinstance(layer, nn.BatchNorm2d) for layer in module.network.modules()),
        "sgd": {key: base.defaults[key] for key in SGD},
        "rho": trained.param_groups[0].get("rho"),
        "scheduler": scheduler[0].scheduler.T_max if scheduler else None,
        "epochs": cli.config.fit.trainer.max_epochs,  # the trainer's own is 1 under fast_dev_run
    }
    if "eta" in expected:
        found |= {"eta": trained.eta, "bias": trained.normalize_bias}
    assert found == expected
    assert type(base).__name__ == "SGD"
    assert cli.config.fit.trainer.precision == "32-true"
    assert module.lr_scheduler_interval == "epoch"
    assert cli.trainer.global_step == 1


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_every_optimizer_trains_as_its_file_says(optimizer, data, fake_cifar10):
    root = ["--data.root", str(fake_cifar10), "--data.batch_size", "8"] if data == "cifar10" else []
    cli = run(f"data/{data}", optimizer, *root)
    block, resolved = yaml.safe_load(optimizer.read_text()), cli.config_dump["model"]["init_args"]["optimizer"]
    assert resolved["class_path"] == block["class_path"]
    for key, value in block["init_args"].items():
        if key == "base":
            assert resolved["init_args"]["base"]["class_path"] == value["class_path"]
            assert resolved["init_args"]["base"]["init_args"].items() >= value["init_args"].items()
        else:
            assert resolved["init_args"][key] == value
    assert cli.trainer.global_step == 1


def test_base_has_no_optimizer():
    """A second optimizer file would keep what it does not mention of the first."""
    layers = [ROOT / "configs/base.yaml", *(ROOT / "configs/data").glob("*.yaml"), *(ROOT / "configs/paper").glob("*")]
    for path in layers:
        assert "optimizer" not in yaml.safe_load(path.read_text()).get("model", {}).get("init_args", {}), path
