"""The command line: `sam-lightning fit | validate | test | predict | sharpness | landscape`."""

import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from sam_lightning.callbacks import EpochHistory, HyperparameterPage, LastCheckpoint, RandomStates
from sam_lightning.cli.measuring import MeasuringTrainer
from sam_lightning.cli.memory import keep_freed_memory
from sam_lightning.cli.messages import SettingsError, explain, is_from_users_code
from sam_lightning.models import ImageClassifier  # noqa: F401  # so that --model ImageClassifier is found
from sam_lightning.runs.checkpoint_io import AtomicCheckpointIO
from sam_lightning.runs.directory import (
    CHECKPOINTS,
    CONFIG,
    CheckpointError,
    differences,
    find_checkpoint,
    hparams_of,
    read_checkpoint,
    run_name,
    with_run_config,
    write_config,
)
from sam_lightning.training.module import SharpnessAwareModule

STRICT = {"allow_abbrev": False}
EPILOG = "Studies, many runs and their report: sam-lightning study --help"


class RunConfig(SaveConfigCallback):
    """Writes the configuration of a training into its run directory."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Writes it, without `ckpt_path`: which checkpoint a command starts from is not part of the run."""
        if stage == "fit":
            config = self.config.clone()
            config.pop("ckpt_path", None)
            write_config(Path(trainer.default_root_dir), self.parser.dump(config, skip_none=False))


class CLI(LightningCLI):
    """LightningCLI with one directory per run, and checkpoints that never change what was typed.

    The run directory is `trainer.default_root_dir`, by default `runs/<data>-<optimizer>-seed<seed>`. It
    holds `config.yaml`, the TensorBoard events and `checkpoints/`.
    """

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands, and two of ours."""
        own = {name: {"model", "datamodule"} for name in ("sharpness", "landscape")}
        return {**LightningCLI.subcommands(), **own}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":  # Lightning would evaluate an untrained network without a word
            parser.set_defaults({"ckpt_path": "last"})
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the report says it
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; a command that names a run and no configuration gets the run's own."""
        arguments = with_run_config(sys.argv[1:] if args is None else list(args))
        self.config = parser.parse_args(arguments)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyperparameters override the command line; here they do not."""

    def before_instantiate_classes(self) -> None:
        """Settles the run directory and the checkpoint."""
        config = self.config[self.subcommand]
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(Path("runs") / run_name(config))
        self.run = Path(config.trainer.default_root_dir)
        if config.ckpt_path:
            path = find_checkpoint(self.run, config.ckpt_path)
            config.ckpt_path = str(path)
            self._compare_settings(path)

    def _compare_settings(self, path: Path) -> None:
        """Refuses to resume with other settings than the checkpoint's; names them before an evaluation.

        A resumed run restores its optimizer and goes on with its data: what was typed anew would be
        overridden unseen, or change the run in its middle.
        """
        self._dump_config()
        found = differences(read_checkpoint(path), self.config_dump, path.parent.parent / CONFIG)
        if not found:
            return
        message = f"{path} was trained with other settings:\n  " + "\n  ".join(found)
        if self.subcommand == "fit":
            raise CheckpointError(
                f"{message}\nResume with the run's own (fit --ckpt_path {path.parent.parent}), or start a new run "
                "without --ckpt_path."
            )
        print(f"sam-lightning: note: {message}", file=sys.stderr)

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer, and the optimizer once: its errors come before the data's load."""
        try:
            super().instantiate_classes()
            self._refuse_options_of_automatic_optimization()
            # A module that makes its own may need the trainer, which it has only later.
            own = type(self.model).configure_optimizers is not SharpnessAwareModule.configure_optimizers
            if self.subcommand == "fit" and not own and list(self.model.parameters()):
                self.model.configure_optimizers()
        except ValueError as error:
            if is_from_users_code(error):
                raise
            raise SettingsError(str(error)) from error
        # Of every module, not only of those that think of it: the configuration, as primitives.
        self._dump_config()
        for key, module in (("model", self.model), ("data", self.datamodule)):
            if module is not None:
                instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
                module.save_hyperparameters({**hparams_of(self.config_dump[key]), **instantiator})

    def _refuse_options_of_automatic_optimization(self) -> None:
        """Lightning would advise to switch to automatic optimization, which cannot run SAM."""
        if isinstance(self.model, SharpnessAwareModule):
            for option, usual, instead in (
                ("gradient_clip_val", None, "--model.gradient_clip_norm"),
                ("accumulate_grad_batches", 1, "--model.accumulate, which cuts each batch into micro-batches"),
            ):
                value = self._get(self.config_init, f"trainer.{option}")
                if value != usual:
                    raise ValueError(f"--trainer.{option} {value} does not apply here: use {instead}.")

    def fit(self, **kwargs: Any) -> None:
        """Trains; says how to go on after an interruption."""
        try:
            self.trainer.fit(**kwargs)
        except SystemExit:  # what Lightning makes of Ctrl-C
            saved = any((self.run / CHECKPOINTS).glob("*.ckpt"))
            how = (
                f"go on with: sam-lightning fit --ckpt_path {self.run}"
                if saved
                else "no epoch was finished, none saved"
            )
            print(f"interrupted: {how}", file=sys.stderr)
            raise

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer, with TensorBoard in the run directory unless another logger is configured."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run, name="", version="", default_hp_metric=False)
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the default: none was configured
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if trainer.checkpoint_callbacks:  # behind the others: what it saves names their newest files
            in_shards = getattr(trainer.strategy, "_save_distributed_checkpoint", False)
            trainer.callbacks.append(LastCheckpoint(in_shards))  # type: ignore[attr-defined]  # of a part of the trainer
        return trainer

    def after_fit(self) -> None:
        """Says what came out and where it is."""
        self._report()

    def after_validate(self) -> None:
        """Says what came out and where it is."""
        self._report()

    def after_test(self) -> None:
        """Says what came out and where it is."""
        self._report()

    def after_predict(self) -> None:
        """Saves what this process predicted: the outputs of `predict_step`, a list with one entry per batch."""
        share = f"-rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = self.run / f"predictions{share}.pt"
        self.run.mkdir(parents=True, exist_ok=True)
        torch.save(self.trainer.predict_loop.predictions, path)
        print(f"{'predictions':<15}{path}")

    @rank_zero_only
    def _report(self) -> None:
        metrics = self.trainer.callback_metrics
        for name in sorted(metrics):
            if name.partition("/")[0] in ("val", "test"):
                print(f"{name.replace('/', ' '):<15}{metrics[name].item():.4f}")
        if self.subcommand != "fit":
            print(f"{'checkpoint':<15}{self.config[self.subcommand].ckpt_path}")
        print(f"{'run':<15}{self.run}")
        checkpoints = sorted((self.run / CHECKPOINTS).glob("*.ckpt"))
        if checkpoints:
            print(f"{'checkpoints':<15}{self.run / CHECKPOINTS}: {', '.join(path.name for path in checkpoints)}")
        print(f"{'tensorboard':<15}tensorboard --host 127.0.0.1 --logdir {self.run}")


def main(args: list[str] | None = None, callbacks: Iterable[Callback] = ()) -> CLI:
    """Runs one command.

    Args:
        args: The command's words; `None`: those of the process.
        callbacks: What else watches the training.

    Raises:
        SystemExit: With a message and a code other than 0 if the input is bad.
    """
    # Lightning 2.6 under newer torch: nothing a user could act on.
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    keep_freed_memory()
    try:
        return CLI(
            LightningModule,
            LightningDataModule,
            trainer_class=MeasuringTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=1,
            # Otherwise --trainer.max_epoch is taken for max_epochs, today.
            parser_kwargs={**{key: STRICT for key in CLI.subcommands()}, **STRICT, "epilog": EPILOG},
            save_config_callback=RunConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={"callbacks": [RandomStates(), EpochHistory(), HyperparameterPage(), *callbacks]},
            args=args,
        )
    except Exception as error:
        message = explain(error)
        if message is None:
            raise
        sys.exit(f"sam-lightning: error: {message}")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless" not in record.getMessage()
