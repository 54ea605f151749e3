"""Runs are compared by what they train with, whichever of it a file names."""

import copy

import pytest
import yaml

from sam_lightning.runs.overwrite import RunExistsError, replaceable
from sam_lightning.runs.settings import differences_to_checkpoint


class Base:
    def __init__(self, depth: int = 3):
        pass


class Model(Base):
    def __init__(self, width: int, gain: float = 1.0, note: str | None = "none", **options):
        pass


class Optimizer:
    def __init__(self, rho: float = 0.05, every: int = 1):
        pass


OPTIMIZER = {"class_path": f"{__name__}.Optimizer", "init_args": {"rho": 0.05, "every": 1}}
NOW = {
    "model": {
        "class_path": f"{__name__}.Model",
        "init_args": {"width": 8, "gain": 1.0, "note": "none", "depth": 3, "optimizer": OPTIMIZER},
    },
    "seed_everything": 1,
}


def older():
    """The same run's configuration, from before depth, gain, note and every were options."""
    config = copy.deepcopy(NOW)
    for name in ("gain", "note", "depth"):
        del config["model"]["init_args"][name]
    del config["model"]["init_args"]["optimizer"]["init_args"]["every"]
    return config


def changed(key, value):
    config = copy.deepcopy(NOW)
    config["model"]["init_args"][key] = value
    return config


def saved(tmp_path, config):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    model = config["model"]
    return {"hyper_parameters": {"_class_path": model["class_path"], **model["init_args"]}}


def test_an_option_that_a_class_has_gained_is_its_default(tmp_path):
    checkpoint = saved(tmp_path, older())
    assert differences_to_checkpoint(checkpoint, NOW, tmp_path / "config.yaml") == []
    with pytest.raises(RunExistsError, match="holds this run already"):
        replaceable(tmp_path, NOW, overwrite=False)


def test_another_value_than_the_default_is_a_difference(tmp_path):
    checkpoint, here = saved(tmp_path, older()), changed("depth", 4)
    assert differences_to_checkpoint(checkpoint, here, tmp_path / "config.yaml") == [("model.depth", 3, 4)]
    with pytest.raises(RunExistsError, match=r"model\.depth: 3 there, 4 here"):
        replaceable(tmp_path, here, overwrite=True)


def test_a_class_that_is_not_imported_has_no_defaults(tmp_path):
    config = older()
    config["model"]["class_path"] = "antigravity.Model"
    (found, *_) = differences_to_checkpoint(saved(tmp_path, config), NOW, tmp_path / "config.yaml")
    assert found == ("model._class_path", "antigravity.Model", f"{__name__}.Model")
