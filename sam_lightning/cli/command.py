"""The command line: `sam-lightning fit | validate | test | predict | sharpness | landscape`."""

import logging
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from sam_lightning.callbacks import EpochHistory, HyperparameterPage, LastCheckpoint, RandomStates
from sam_lightning.cli.config_objects import refuse_objects, without_partials
from sam_lightning.cli.malloc import keep_freed_memory
from sam_lightning.cli.messages import SettingsError, explain, first_cause, is_from_users_code
from sam_lightning.cli.outcome import print_outcome, save_predictions, say_how_to_go_on
from sam_lightning.cli.parsing import parse
from sam_lightning.cli.run_files import RunFiles, compare_with_checkpoint, with_run_config
from sam_lightning.cli.sharpness import MeasuringTrainer
from sam_lightning.models import ImageClassifier  # noqa: F401  # so that --model ImageClassifier is found
from sam_lightning.runs.checkpoint_io import AtomicCheckpointIO
from sam_lightning.runs.checkpoints import find_checkpoint
from sam_lightning.runs.configs import with_packaged_files
from sam_lightning.runs.directory import CHECKPOINTS, run_name
from sam_lightning.runs.overwrite import replaceable
from sam_lightning.runs.settings import hparams_of
from sam_lightning.training import SharpnessAwareModule
from sam_lightning.training.methods import trains_plainly

STRICT = {"allow_abbrev": False}
TOP = {
    "prog": "sam-lightning",
    "exit_on_error": False,  # our own messages
    "epilog": "Two more commands: sam-lightning study --help, sam-lightning configs --help",
}


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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._words = list(sys.argv[1:] if kwargs.get("args") is None else kwargs["args"])
        super().__init__(*args, **kwargs)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        asked = self._words[0] if self._words else None
        if asked in self.subcommands() and subcommand != asked:  # each costs 50 ms, and nobody asks for its options
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--overwrite", action="store_true", help="Replace an equal run in the run directory.")
        else:  # Lightning would evaluate an untrained network without a word
            parser.set_defaults({"ckpt_path": "last"})
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # the report says it
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses; a command that names a run and no configuration gets the run's own."""
        words = with_run_config(with_packaged_files(self._words))
        self.config = parse(parser, words, self._subcommand_parsers)

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyperparameters override the command line; here they do not."""

    def before_instantiate_classes(self) -> None:
        """Settles the run directory and the checkpoint."""
        config = self.config[self.subcommand]
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = str(Path("runs") / run_name(config))
        self.run = Path(config.trainer.default_root_dir)
        self._replaced: list[Path] = []  # files of an earlier run
        self.config[self.subcommand] = config = without_partials(config, self._parser(self.subcommand))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"\s*Unable to serialize")  # refused in the next line
            self._dump_config()
        refuse_objects(self.config_dump)
        if config.ckpt_path:
            path = find_checkpoint(self.run, config.ckpt_path)
            config.ckpt_path = str(path)
            compare_with_checkpoint(path, self.config_dump, is_resumed=self.subcommand == "fit")
        elif self.subcommand == "fit" and not config.trainer.fast_dev_run:
            self._replaced = replaceable(self.run, self.config_dump, config.overwrite)

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer, and the optimizer once: its errors come before the data's load."""
        try:
            super().instantiate_classes()
            if self.subcommand == "fit" and self._can_make_optimizer():
                self.model.configure_optimizers()
            if self.subcommand == "fit" and trains_plainly(self.model, self.trainer):
                name = type(self.model).__name__
                print(
                    f"sam-lightning: note: {name} trains plainly. For sharp steps: --trainer.callbacks+="
                    "sam_lightning.training.SharpnessAwareTraining --trainer.callbacks.method SAM",
                    file=sys.stderr,
                )
        except (ValueError, MisconfigurationException) as error:
            cause = first_cause(error)
            if is_from_users_code(error) or not isinstance(cause, ValueError | MisconfigurationException):
                raise
            raise SettingsError(str(cause)) from error
        # Of every module, not only of those that think of it: the configuration, as primitives.
        self._dump_config()
        for key, module in (("model", self.model), ("data", self.datamodule)):
            if module is not None:
                instantiator = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
                hparams = {**hparams_of(self.config_dump[key]), **instantiator}
                # Lightning's logger refuses two modules with an argument of one name; the model's suffice there.
                module.save_hyperparameters(hparams, logger=key == "model")

    def _can_make_optimizer(self) -> bool:
        """Whether the optimizer can be made already: a module's own code may need the trainer, which it has later."""
        return (
            isinstance(self.model, SharpnessAwareModule)
            and self.model.makes_optimizer_by_factory
            and type(self.model).parameter_groups.__module__.startswith("sam_lightning.")
            and any(True for _ in self.model.parameters())
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer; logs and checkpoints go into the run directory unless another place is configured."""
        if self._get(self.config_init, "trainer.logger") in (None, True):
            kwargs["logger"] = TensorBoardLogger(self.run, name="", version="", default_hp_metric=False)
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the default: none was configured
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a part of the trainer
        if trainer.checkpoint_callbacks:  # behind the others: what it saves names their newest files
            callbacks.append(LastCheckpoint(getattr(trainer.strategy, "_save_distributed_checkpoint", False)))
        for callback in trainer.checkpoint_callbacks:  # otherwise they follow the logger, wherever that is
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(self.run / CHECKPOINTS)
        if self.subcommand == "fit" and not self._get(self.config_init, "trainer.fast_dev_run"):
            callbacks.insert(0, RunFiles(self.run, self._own_config(), self._replaced))
        return trainer

    def _own_config(self) -> str:
        """The run's configuration: how a command starts, from which checkpoint or over which run, is no part of it."""
        config = self.config["fit"].clone()
        for key in ("ckpt_path", "overwrite"):
            config.pop(key, None)
        return str(self._parser("fit").dump(config, skip_none=False))

    def fit(self, **kwargs: Any) -> None:
        """Trains; says how to go on after an interruption."""
        try:
            self.trainer.fit(**kwargs)
        except SystemExit:  # what Lightning makes of Ctrl-C
            say_how_to_go_on(self.run)
            raise

    def after_fit(self) -> None:
        """Says what came out and where it is."""
        print_outcome(self.trainer, self.run, evaluated=None)

    def after_validate(self) -> None:
        """Says what came out and where it is."""
        print_outcome(self.trainer, self.run, self.config[self.subcommand].ckpt_path)

    def after_test(self) -> None:
        """Says what came out and where it is."""
        print_outcome(self.trainer, self.run, self.config[self.subcommand].ckpt_path)

    def after_predict(self) -> None:
        """Saves what was predicted."""
        save_predictions(self.trainer, self.run)


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
    # RunFiles and `replaceable` have seen to what lies there.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
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
            parser_kwargs={**{key: STRICT for key in CLI.subcommands()}, **STRICT, **TOP},
            save_config_callback=None,  # RunFiles
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
