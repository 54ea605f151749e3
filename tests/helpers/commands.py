"""Commands as a user types them, on a few batches of the digits, and what a failing one says."""

from pathlib import Path

import pytest

from sam_lightning.cli import main

ROOT = Path(__file__).parents[2]
BASE = ["-c", f"{ROOT}/configs/base.yaml", "-c", f"{ROOT}/configs/data/digits.yaml"]
QUICK = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
QUICK += ["--trainer.accelerator", "cpu", "--trainer.limit_train_batches", "4", "--trainer.log_every_n_steps", "2"]


def fit(*more, optimizer="sam", epochs=1):
    words = ["fit", *BASE, "--model.optimizer", f"{ROOT}/configs/optimizers/{optimizer}.yaml", *QUICK]
    return main([*words, "--trainer.max_epochs", str(epochs), *more])


def fails(capsys, *args):
    """What a command that must fail tells its user."""
    with pytest.raises(SystemExit) as exit_:
        main(list(args))
    code = exit_.value.code
    assert code not in (0, None)
    return (code if isinstance(code, str) else "") + capsys.readouterr().err
