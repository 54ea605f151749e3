"""Whatever is typed wrongly: which option or file, what came, what is allowed, and the nearest name."""

from pathlib import Path

import pytest

from commands import ROOT
from sam_lightning import __main__
from sam_lightning.cli import CLI
from sam_lightning.cli.mistyped import what_is_mistyped

FILES = {
    "key.yaml": "trainer:\n  max_epoch: 3\n",
    "root.yaml": "modle:\n  width: 3\n",
    "type.yaml": "trainer:\n  max_epochs: lots\n",
    "callback.yaml": "trainer:\n  callbacks:\n    - class_path: ModelCheckpoint\n      init_args: {monitr: x}\n",
    "network.yaml": "model:\n  init_args:\n    network: {class_path: sam_lightning.models.digits_cn}\n",
    "optimizer.yaml": "class_path: sam_lightning.SAM\ninit_args: {base: {class_path: SGD, init_args: {lrr: 0.1}}}\n",
    "broken.yaml": "trainer: {\n",
    "list.yaml": "- a\n- b\n",
}
SAM = ["--model.optimizer", f"{ROOT}/configs/optimizers/sam.yaml"]
FIT = ["fit", "-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/data/digits.yaml"]
CASES = [
    ("--model.optimizer.rhoo 0.1", "--model.optimizer.rhoo: SAM has no such option; did you mean rho?"),
    (
        "--model.optimizer.init_args.rhoo=1",
        "--model.optimizer.init_args.rhoo: SAM has no such option; did you mean rho?",
    ),
    ("--model.optimizer.base.lrr 0.1", "--model.optimizer.base.lrr: SGD has no such option; did you mean lr?"),
    (
        "--model.labelsmoothing 0",
        "--model.labelsmoothing: ImageClassifier has no such option; did you mean label_smoot",
    ),
    ("--data.batchsize 3", "--data.batchsize: Digits has no such option; did you mean batch_size?"),
    ("--model.network.wdth 3", "--model.network.wdth: digits_cnn has no such option; did you mean width?"),
    ("--model.network.colour 3", "digits_cnn has no such option. It has num_classes, width."),
    (
        "--trainer.callbacks.monitr x",
        "--trainer.callbacks.monitr: ModelCheckpoint has no such option; did you mean moni",
    ),
    ("--trainer.max_epoch 3", "--trainer.max_epoch: there is no such option; did you mean --trainer.max_epochs?"),
    ("--trainr.max_epochs 3", "--trainr.max_epochs: there is no such option; did you mean --trainer.max_epochs?"),
    ("--overwrit", "--overwrit: there is no such option; did you mean --overwrite?"),
    ("--xyz 3", "--xyz: there is no such option (see sam-lightning fit --help)."),
    ("stray", "stray: this word belongs to no option."),
    ("--trainer.max_epochs", "--trainer.max_epochs needs a value."),
    ("--trainer.max_epochs three", "--trainer.max_epochs: must be int or null, got three."),
    ("--model.optimizer.rho big", "--model.optimizer.rho: must be float, got big."),
    ("--model.network.width wide", "--model.network.width: must be int, got wide."),
    ("--data.validation some", "--data.validation: must be split, test or none, got some."),
    ("--model ImageClassifer", "--model: ImageClassifer: there is no such class; did you mean sam_lightning.models.Im"),
    (
        "--model.optimizer sam_lightning.SAMM",
        "sam_lightning.SAMM: there is no such class; did you mean sam_lightning.SAM?",
    ),
    (
        "--model.optimizer.base torch.optim.SDG",
        "--model.optimizer.base: torch.optim.SDG: there is no such class; did y",
    ),
    (
        "--data nowhere.Data",
        "--data: nowhere.Data: there is no module nowhere. Give its path, such as my_module.MyClass",
    ),
    ("--data imports.Data", "--data: imports.Data cannot be imported: there is no module not_installed."),
    ("--model.optimizer sam_lightning.SAM", "--model.optimizer.base must be given: SAM has no default for it."),
    (
        "-c missing.yaml",
        "--config: no such file: missing.yaml, neither here nor among those that `sam-lightning configs`",
    ),
    ("-c data/digit.yaml", "--config: no such file: data/digit.yaml; did you mean data/digits.yaml?"),
    (
        "--model.optimizer optimizers/sma.yaml",
        "--model.optimizer: no such file: optimizers/sma.yaml; did you mean opti",
    ),
    ("-c key.yaml", "key.yaml: trainer.max_epoch: there is no such option; did you mean trainer.max_epochs?"),
    ("-c root.yaml", "root.yaml: modle.width: there is no such option; did you mean model.width?"),
    ("-c type.yaml", "type.yaml: trainer.max_epochs: must be int or null, got lots."),
    (
        "-c callback.yaml",
        "callback.yaml: trainer.callbacks.init_args.monitr: ModelCheckpoint has no such option; did yo",
    ),
    (
        "-c network.yaml",
        "network.yaml: model.init_args.network.class_path: sam_lightning.models.digits_cn: there is no ",
    ),
    (
        "--model.optimizer optimizer.yaml",
        "optimizer.yaml: model.optimizer.init_args.base.init_args.lrr: SGD has no such",
    ),
    ("-c broken.yaml", "broken.yaml: no valid YAML in line 2"),
    ("-c list.yaml", "list.yaml: must hold settings by name, got list."),
]
WHOLE = [
    ("fitt", "fitt is no command; did you mean fit?"),
    ("dance", "dance is no command: give one of fit, validate, test, predict, sharpness, landscape, study, configs."),
    ("fit", "--data and --model must be given, or files that set them: -c base.yaml -c data/digits.yaml, for example."),
    ("test --ckpt x", "--ckpt: there is no such option; did you mean --ckpt_path?"),
    ("sharpness --settings.roh 1", "--settings.roh: there is no such option; did you mean --settings.rho?"),
    ("landscape --points two", "--points: must be int, got two."),
    ("configs cop x", "configs cop x: give `configs` alone"),
    ("study rnu a", "study rnu: there is no such command; did you mean run?"),
    ("study", "study needs a command: run or report."),
    ("study run", "study run needs a study: a file or one of the packaged"),
    (
        "study run quikstart",
        "no study quikstart: it is neither a file nor one of the packaged studies; did you mean quickstart?",
    ),
    ("study run a --dryrun", "study run --dryrun: there is no such option; did you mean --dry-run?"),
    ("study run a --jobs none", "study run --jobs: must be an integer >= 1, got none"),
    ("study run a --launcher slrm", "study run --launcher: must be local or slurm, got slrm"),
    ("study run a --only arm=SMA --dry-run", "--only arm=SMA: allowed are the values SAM, SGD."),
    ("study run a b", "study run b is too much."),
]


@pytest.fixture(autouse=True)
def _in_a_folder_with_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("imports.py").write_text("import not_installed\n")
    for name, content in FILES.items():
        Path(name).write_text(content)


def said(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        __main__.main(words)
    assert exit_.value.code not in (0, None)
    printed = capsys.readouterr()
    text = printed.err + (exit_.value.code if isinstance(exit_.value.code, str) else "")
    text = text.replace("Seed set to 1\n", "")
    assert printed.out == ""
    assert text.startswith("sam-lightning: error: ")
    assert len(text.splitlines()) <= 5
    assert "usage" not in text
    assert not Path("runs").exists()
    return text.removeprefix("sam-lightning: error: ")


@pytest.mark.parametrize(("typed", "expected"), CASES, ids=[typed for typed, _ in CASES])
def test_a_mistyped_training(capsys, typed, expected):
    optimizer = [] if typed.startswith("--model.optimizer ") else SAM
    assert expected in said(capsys, [*FIT, *optimizer, *typed.split()])


@pytest.mark.parametrize(("typed", "expected"), WHOLE, ids=[typed for typed, _ in WHOLE])
def test_a_mistyped_command(capsys, typed, expected):
    assert expected in said(capsys, typed.split())


def test_a_model_without_its_optimizer(capsys):
    assert said(capsys, FIT) == "--model.optimizer must be given: ImageClassifier has no default for it."


def test_a_message_of_another_kind_is_cut():
    text = "something else\n" * 30
    assert what_is_mistyped(text, ["fit"], {"fit": object()}).count("\n") <= 3


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(capsys, words):
    __main__.main(words)
    out = capsys.readouterr().out
    for command in ("fit", "validate", "test", "predict", "sharpness", "landscape", "study", "configs"):
        assert f"\n  {command} " in out


def test_the_commands_are_those_of_the_parser():
    assert set(__main__.COMMANDS) == {*CLI.subcommands(), "study", "configs"}
