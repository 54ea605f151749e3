"""The configuration files: complete blocks, the paper's values, and every arm trains."""

import json
from pathlib import Path

import pytest
import yaml
from torch import nn

from sam_lightning.cli import main
from sam_lightning.studies.execute import execute
from sam_lightning.studies.runs import runs_of
from sam_lightning.studies.spec import load

ROOT = Path(__file__).parents[2]
OPTIMIZERS = sorted((ROOT / "configs/optimizers").glob("*.yaml"))
QUICK = ["--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false"]

SGD = {"lr": 0.01, "weight_decay": 5e-4, "momentum": 0.0}
# What the paper's code and logs show, arm by arm: (layer, optimizer, overrides) -> expected.
SHARED = {"num_classes": 1000, "stats": "both", "crop": False, "flip": False, "validation": "test", "smoothing": 0.0}
AB = {**SHARED, "epochs": 100, "scheduler": None, "normalisation": "half", "norms": 20, "sgd": SGD}
C = {**SHARED, "epochs": 200, "scheduler": 200, "normalisation": "unit", "norms": 0, "sgd": {**SGD, "momentum": 0.9}}
SAM, ASAM = {"rho": 0.05}, {"rho": 0.5, "eta": 0.0, "bias": True}
# The study's cells -> expected.
CELLS = {
    **{("a", f"{arm}, batch size 128"): {**AB, "batch": 128, **own} for arm, own in (("SGD", {}), ("SAM", SAM))},
    **{
        ("b", f"{arm}, batch size {batch}"): {**AB, "batch": batch, **own}
        for arm, own in (("SGD", {}), ("SAM", SAM))
        for batch in (16, 64, 128)
    },
    **{("c", arm): {**C, "batch": 128, **own} for arm, own in (("SAM", SAM), ("ASAM", ASAM))},
    **{
        ("c", f"{arm} with BatchNorm"): {**C, "batch": 128, "norms": 20, **own}
        for arm, own in (("SAM", SAM), ("ASAM", ASAM))
    },
}


def run(layer, optimizer, *more):
    layers = ["-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/{layer}.yaml"]
    return main(["fit", *layers, "--model.optimizer", str(optimizer), *QUICK, *more])


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_papers_studies_have_these_cells():
    for name in "abc":
        cells = {(name, cell.label) for cell in load(str(ROOT / f"configs/studies/{name}.yaml")).cells()}
        assert cells == {key for key in CELLS if key[0] == name}


@pytest.mark.filterwarnings("ignore:WeightHistograms writes to TensorBoard")  # a quick run has no logger
@pytest.mark.parametrize(("study", "label"), CELLS)
def test_the_papers_arms_train_with_its_values(study, label, fake_cifar10):
    expected = {"rho": None, **CELLS[study, label]}
    runs = runs_of(load(str(ROOT / f"configs/studies/{study}.yaml"), {"data.root": str(fake_cifar10)}))
    words = next(run.words for run in runs if run.cell.label == label)
    cli = main([*words, *QUICK])
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


CORRECTED = load(str(ROOT / "configs/studies/corrected.yaml"))


@pytest.mark.parametrize("arm", CORRECTED.arms)
def test_the_corrected_arms_train_by_todays_protocol(arm, fake_cifar10):
    run = next(run for run in runs_of(CORRECTED) if run.cell.arm == arm)
    cli = main([*run.words, "--data.root", str(fake_cifar10), "--data.batch_size", "8", *QUICK])
    trained = cli.trainer.optimizers[0]
    base = getattr(trained, "base", trained)
    data, module = cli.datamodule, cli.model
    assert (data.validation, data.normalisation) == ("split", "standard")
    assert data.random_crop
    assert data.horizontal_flip
    assert module.network.fc.out_features == 10
    assert module.network.conv1.stride == (1, 1)
    assert isinstance(module.network.maxpool, nn.Identity)
    assert module.batch_norm_stats == "first"
    assert {key: base.defaults[key] for key in SGD} == {"lr": 0.1, "weight_decay": 5e-4, "momentum": 0.9}
    assert trained.param_groups[0].get("rho") == {"SGD": None, "SAM": 0.05, "ASAM": 0.5}[arm.split()[0]]
    (schedule,) = cli.trainer.lr_scheduler_configs
    epochs = 100 if "half" in arm else 200
    assert schedule.scheduler.T_max == cli.config.fit.trainer.max_epochs == epochs


def test_the_corrected_study_chooses_on_the_split_and_tests_once(fake_cifar10, tmp_path):
    """Three epochs of its first arm."""
    settings = {"trainer.limit_train_batches": "2", "data.root": str(fake_cifar10), "data.batch_size": "8"}
    settings |= {"trainer.accelerator": "cpu", "trainer.max_steps": "6", "data.validation_fraction": "0.2"}
    study = load(str(ROOT / "configs/studies/corrected.yaml"), settings)
    run = runs_of(study)[0]
    assert run.cell.arm == "SGD"
    execute(run.words, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["selected_on"] == "validation"
    assert result["last"]["epoch"] == 3
    accuracy = {epoch["epoch"]: epoch["val/accuracy"] for epoch in result["epochs"]}
    assert accuracy[result["best"]["epoch"]] == max(accuracy.values())
    assert result["best"]["test/accuracy"] is not None
    assert all("test/accuracy" not in epoch for epoch in result["epochs"])


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


@pytest.mark.parametrize("name", ["quickstart", "rho"])
def test_every_arm_on_digits_trains(name):
    study = load(str(ROOT / f"configs/studies/{name}.yaml"))
    for run in {run.cell.arm: run for run in runs_of(study)}.values():
        cli = main([*run.words, *QUICK])
        rho = cli.trainer.optimizers[0].param_groups[0].get("rho")
        settings = {**study.arms[run.cell.arm].set, **dict(run.cell.point)}
        assert rho == settings.get("model.optimizer.rho", {"SGD": None, "SAM": 0.05, "ASAM": 0.5}[run.cell.arm])
        assert cli.datamodule.label_noise == 0.4


def test_the_quickstarts_radii_are_chosen_elsewhere():
    quickstart, rho = (load(str(ROOT / f"configs/studies/{name}.yaml")) for name in ("quickstart", "rho"))
    assert quickstart.layers == rho.layers
    assert not set(quickstart.seeds) & set(rho.seeds)
    for arm in ("SAM", "ASAM"):
        assert quickstart.arms[arm].set["model.optimizer.rho"] in rho.grid_of(arm)["model.optimizer.rho"]
        assert quickstart.arms[arm].optimizer == rho.arms[arm].optimizer


def test_base_has_no_optimizer():
    """A second optimizer file would keep what it does not mention of the first."""
    layers = [
        *(ROOT / "configs").glob("*.yaml"),
        *(ROOT / "configs/data").glob("*.yaml"),
        *(ROOT / "configs/paper").glob("*"),
    ]
    for path in layers:
        assert "optimizer" not in yaml.safe_load(path.read_text()).get("model", {}).get("init_args", {}), path
