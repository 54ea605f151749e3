"""Who may import whom, what importing the package costs, and that the project speaks of itself alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sam_lightning

PACKAGE = Path(sam_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a file imports from its own layer's package and from lower ones.
LAYERS = [
    {"optim", "batch_norm", "networks", "micro_batches", "lr_schedules", "files", "memory", "sharding"},
    {"sharpness", "figure_files"},
    {"landscape", "landscape_figures"},
    {"run_directory", "strategies"},
    {"loops", "checkpoint_io"},
    {"manual", "data", "callbacks"},
    {"module"},
    {"classifier", "sharpness_monitor"},
    {"measuring"},
    {"messages"},
    {"cli"},
    {"studies"},
    {"__main__"},
]
TORCH_ONLY = {"__init__", "optim", "batch_norm", "networks", "sharding", "sharpness", "landscape"}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    here = part(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "sam_lightning" and len(parts) > 1 and parts[1] in level and here in level and parts[1] != here:
            assert level[parts[1]] < level[here] or parts[1] == "optim", f"{path} imports {name}"
        if here in TORCH_ONLY:
            assert parts[0] not in {"lightning", "lightning_utilities", "torchmetrics", "sklearn"}, f"{path}: {name}"


def test_every_file_has_its_layer():
    assert {part(path) for path in FILES} == {"__init__"} | set.union(*LAYERS)


@pytest.mark.parametrize("module", ["", ".studies.command", ".studies.spec", ".studies.report", ".studies.figures"])
def test_what_needs_no_lightning_imports_none(module):
    heavy = ("lightning", "torchvision", "torchmetrics")
    code = f"import sys, sam_lightning{module}; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("name", ["spec", "report", "figures"])
def test_tables_and_figures_know_no_torch(name):
    assert not {imported.partition(".")[0] for imported in imports(PACKAGE / f"studies/{name}.py")} & {
        "torch",
        "lightning",
    }


def test_public_names():
    assert sam_lightning.__all__ == ["ASAM", "SAM", "SharpnessAware"]


def test_files_fit_in_the_head():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 240, path
