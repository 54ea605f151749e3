"""A process that stays warm: it imports once and then executes one run after the other.

Requests come in as lines of JSON on standard input, answers go out as lines of JSON on what was standard output
when the process began. What a run prints goes into its log. When the input ends, because the study's process has,
whatever way, the worker ends with it.
"""

import io
import json
import os
import queue
import sys
import threading
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from sam_lightning.cli import main
from sam_lightning.runs.directory import LOG
from sam_lightning.studies.execute import execute, printing_into
from sam_lightning.studies.sharpness_spec import SharpnessSpec


class Answers:
    """The stream on which this process answers, out of the reach of whatever prints."""

    def __init__(self) -> None:
        self._stream = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def send(self, **answer: Any) -> None:
        """Sends one answer."""
        self._stream.write(json.dumps(answer) + "\n")
        self._stream.flush()


class Progress(Callback):
    """Tells the study of every finished epoch."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells how many epochs a resumed run has behind it."""
        self._answers.send(epoch=trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the epoch's number."""
        self._answers.send(epoch=trainer.current_epoch + 1)


def serve() -> None:
    """Answers until the input ends."""
    answers, requests = Answers(), _requests()
    while True:
        request = requests.get()
        if "check" in request:
            answers.send(**_check(request["check"]))
            continue
        directory = Path(request["directory"])
        with printing_into(directory / LOG):
            try:
                execute(request["words"], directory, [Progress(answers)], SharpnessSpec.of(request["sharpness"]))
            except SystemExit as error:  # the command line's own words, printed already unless they are the code
                if isinstance(error.code, str):
                    print(error.code, file=sys.stderr)
                answers.send(failed=True)
            except Exception:  # whatever it is, the other runs go on
                traceback.print_exc()
                answers.send(failed=True)
            else:
                answers.send(done=True)


def _requests() -> "queue.SimpleQueue[dict[str, Any]]":
    requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    # Not sys.stdin: a data loader's forked worker closes that, and would wait for ever for this thread's lock on it.
    stream = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def read() -> None:
        for line in stream:
            requests.put(json.loads(line))
        os._exit(0)  # at once: a run without its study would write beside the next one

    threading.Thread(target=read, daemon=True).start()
    return requests


def _check(words: list[str]) -> dict[str, Any]:
    """Whether a command parses, and how many epochs it trains; nothing is built."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([*words, "--print_config"])
        except SystemExit as error:
            code = error.code
    if code:
        return {"error": code if isinstance(code, str) else err.getvalue()}
    trainer = yaml.safe_load(out.getvalue())["trainer"]
    if trainer["devices"] not in (1, "1", "auto") or trainer["num_nodes"] != 1:
        return {"error": "a study's runs use one device each: trainer.devices must be 1. For more use `fit`."}
    return {"epochs": trainer["max_epochs"] or 0}


if __name__ == "__main__":
    serve()
