"""Every file in configs/optimizers is a complete block that builds what it names."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import OptimizerCallable

from cases import CASES, Net
from sam_lightning import SharpnessAware

FILES = sorted((Path(__file__).parents[2] / "configs/optimizers").glob("*.yaml"))


def build(block):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # its older name
    made = instantiate(parser.parse_object({"optimizer": block}))
    return made.optimizer(list(Net().named_parameters()))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_builds_what_it_names(file):
    block = yaml.safe_load(file.read_text())
    optimizer = build(block)
    assert type(optimizer).__name__ == block["class_path"].rpartition(".")[2]
    for name, value in block["init_args"].items():
        if name not in ("base", "rho", "lr", "momentum", "weight_decay"):
            assert getattr(optimizer, name) == value
    if isinstance(optimizer, SharpnessAware):
        assert optimizer.param_groups[0]["rho"] == block["init_args"]["rho"]
        assert {**optimizer.defaults, **block["init_args"]["base"]["init_args"]} == optimizer.defaults
        with pytest.raises(Exception, match="nonsense"):
            build({**block, "init_args": {**block["init_args"], "nonsense": 1}})


def test_every_method_has_a_file():
    named = {yaml.safe_load(file.read_text())["class_path"] for file in FILES}
    assert {f"sam_lightning.{case.optimizer.__name__}" for case in CASES} | {"torch.optim.SGD"} == named
