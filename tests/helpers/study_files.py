"""Study files for tests, and runs as they leave their directories when they are finished."""

import json
from pathlib import Path

import numpy as np
import yaml

from sam_lightning.runs.directory import RESULT, WEIGHTS

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "configs/studies"
SMALL = {
    "question": "Which?",
    "layers": [f"{ROOT}/configs/base.yaml", f"{ROOT}/configs/data/digits.yaml"],
    "arms": {"SGD": f"{ROOT}/configs/optimizers/sgd.yaml", "SAM": f"{ROOT}/configs/optimizers/sam.yaml"},
    "seeds": [1, 2],
}


def written(folder, name="small", **changes):
    """A study file with these keys changed; those that are None are left out."""
    path = folder / f"{name}.yaml"
    content = {**SMALL, **changes}
    path.write_text(
        yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False)
    )
    return path


def finished(run, root, accuracy=0.5, selected_on="validation"):
    """A run's directory as a finished run leaves it."""
    folder = root / run.name
    folder.mkdir(parents=True)
    epochs = [
        {"epoch": i, "seconds": 2.0, "val/loss": 1.0, "val/accuracy": accuracy + i / 100, "train/loss_epoch": 1.0 / i}
        for i in (1, 2, 3)
    ]
    test = {} if selected_on == "test" else {"test/accuracy": accuracy, "test/loss": 1.0}
    content = {
        "epochs": epochs,
        "last": {"epoch": 3, **test},
        "best": {"epoch": 2, **test},
        "selected_on": selected_on,
        "gradients_per_step": 1,
        "command": [],
        "conditions": {
            "precision": "32-true",
            "device": "A Processor",
            "threads": 1,
            "processes": 1,
            "versions": {"sam-lightning": "0", "torch": "2", "torchvision": "0", "lightning": "2"},
            "commit": None,
        },
    }
    (folder / RESULT).write_text(json.dumps(content))
    np.savez(folder / WEIGHTS, **{"network.conv1.weight": np.array([-1.0, 0.0, 0.005, 1.0], dtype=np.float32)})
