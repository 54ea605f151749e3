"""The pictures of `sam-lightning landscape`: around one solution, around two side by side, and between the two."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule
from matplotlib.figure import Figure

from sam_lightning.cli.landscape_figures import line, planes
from sam_lightning.runs.checkpoints import read_checkpoint
from sam_lightning.runs.figure_files import save
from sam_lightning.sharpness.batches import samples_in
from sam_lightning.sharpness.landscape import Direction, direction_to, random_direction, scan
from sam_lightning.sharpness.objective import Loss
from sam_lightning.sharpness.preserved_state import BatchNorm


class Landscape:
    """Scans the loss around a module's weights, and draws into its run's directory.

    Args:
        model: The module, with the weights in the middle.
        loss: The mean loss of a batch.
        batches: The data.
        run: The run's directory.
        checkpoint: Where the weights came from.
        points: Points along each direction.
        reach: Largest step along a random direction.
        seed: Seed of the directions.

    Attributes:
        figures: What was drawn, without endings.
    """

    def __init__(
        self,
        model: LightningModule,
        loss: Loss,
        batches: Sequence[Any],
        run: Path,
        checkpoint: Path,
        points: int,
        reach: float,
        seed: int,
    ) -> None:
        self.figures: list[Path] = []
        self._model, self._loss, self._batches, self._seed = model, loss, batches, seed
        self._run, self._checkpoint = run, checkpoint
        self._steps: list[float] = np.linspace(-reach, reach, points).tolist()
        self._samples = sum(map(samples_in, batches))
        self._about: dict[str, Any] = {"checkpoint": str(checkpoint), "samples": self._samples, "seed": seed}
        self._where = f"seed {seed}, filter-normalised, running statistics, {self._samples} training samples."

    def around(self) -> None:
        """Along a random direction, and over the plane of it and a second one."""
        direction = random_direction(self._model, self._seed)
        losses = self._scan("line", [direction], [self._steps], self._about)
        name = "Step along a random direction"
        self._draw("line", line(self._steps, losses, name, f"Random direction, {self._where}"))
        plane = self._plane("plane", self._about)
        self._draw("plane", planes([self._steps] * 2, {self._run.name: plane}, f"Two random directions, {self._where}"))

    def with_other(self, other: Path) -> None:
        """The straight line to another solution, and the planes around both in the same levels.

        Args:
            other: The other's checkpoint.

        Raises:
            ValueError: If it is of another network.
        """
        state = read_checkpoint(other)["state_dict"]
        here, there = names = self._names(other)
        axis = np.linspace(-0.25, 1.25, len(self._steps)).tolist()
        about = {**self._about, "other": str(other)}
        losses = self._scan("between", [direction_to(self._model, state)], [axis], about, batch_norm="batch")
        caption = f"Straight line, not normalised, statistics of each batch, {self._samples} training samples."
        self._draw("between", line(axis, losses, f"From {here} to {there}", caption, ("0", "1")))

        own = self._plane("plane", self._about)
        kept = {name: value.clone() for name, value in self._model.state_dict().items()}
        self._model.load_state_dict(state)
        try:
            others = self._plane("plane-other", {**self._about, "checkpoint": str(other)})
        finally:
            self._model.load_state_dict(kept)
        caption = f"Two random directions around each solution, {self._where}"
        self._draw("both", planes([self._steps] * 2, dict(zip(names, (own, others), strict=True)), caption))

    def _plane(self, name: str, about: dict[str, Any]) -> np.ndarray:
        directions = [random_direction(self._model, self._seed + i) for i in (0, 1)]
        return self._scan(name, directions, [self._steps] * 2, about)

    def _scan(
        self,
        name: str,
        directions: Sequence[Direction],
        axes: Sequence[Sequence[float]],
        about: dict[str, Any],
        batch_norm: BatchNorm = "running",
    ) -> np.ndarray:
        path = self._run / f"landscape-{name}.npz"
        return scan(self._model, self._loss, self._batches, directions, axes, path, about, batch_norm)

    def _names(self, other: Path) -> list[str]:
        """The runs' names, with their folders where both have one name; two checkpoints of one run by their own."""
        paths = [path.resolve() for path in (self._checkpoint, other)]
        runs = [path.parent.parent.parts for path in paths]
        if runs[0] == runs[1]:
            return [path.stem for path in paths]
        depth = next(n for n in itertools.count(1) if runs[0][-n:] != runs[1][-n:])
        return ["/".join(run[-depth:]) for run in runs]

    def _draw(self, name: str, figure: Figure) -> None:
        path = self._run / f"landscape-{name}"
        save(figure, path)
        self.figures.append(path)
        print(f"{'figure':<15}{path}.png")
