"""Who may import whom, what importing the package costs, and that the project speaks of itself alone."""

import ast
import itertools
from pathlib import Path

import pytest

import sam_lightning
from cases import CASES
from sam_lightning import optim

PACKAGE = Path(sam_lightning.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a room imports from itself and from lower ones.
ROOMS = ["tensors", "replay", "optim", "runs", "sharpness", "data", "training", "models", "callbacks", "cli", "studies"]
TORCH_ONLY = {"__init__", "tensors", "replay", "optim", "sharpness"}


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, at_once: bool = False) -> set[str]:
    """Names of what a file imports, or of what is imported as soon as the file is."""
    found, tree = set(), ast.parse(path.read_text())
    later = (ast.FunctionDef, ast.ClassDef) if at_once else ()
    for node in itertools.chain(*(ast.walk(part) for part in tree.body if not isinstance(part, later))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    here = part(path)
    below = ROOMS if here == "__main__" else ["optim"] if here == "__init__" else ROOMS[: ROOMS.index(here) + 1]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "sam_lightning" and len(parts) > 1 and parts[1] in ROOMS:
            assert parts[1] in below, f"{path} imports {name}"
        if here in TORCH_ONLY:
            assert parts[0] not in {"lightning", "lightning_utilities", "torchmetrics", "sklearn"}, f"{path}: {name}"


def test_the_root_holds_rooms_and_two_modules():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_says_what_it_is_for_and_only_hands_names_on(room):
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text())
    assert ast.get_docstring(tree)
    assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in tree.body)


@pytest.mark.parametrize("name", ["", "studies.command", "studies.spec", "studies.statistics", "studies.figures"])
def test_what_needs_no_lightning_imports_none(name):
    """Nor does what it imports, as files are written: to start a process takes seconds."""
    waiting, seen, others = {f"sam_lightning.{name}".rstrip(".")}, set(), set()
    while waiting:
        found = waiting.pop()
        path = PACKAGE.joinpath(*found.split(".")[1:])
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if found.partition(".")[0] != "sam_lightning":
            others.add(found.partition(".")[0])
        elif path.is_file():  # else it is a name in a file that is waiting, too
            seen.add(found)
            waiting |= {found.rpartition(".")[0] or found, *imports(path, at_once=True)} - seen
    assert "torch" in others
    assert not others & {"lightning", "torchvision", "torchmetrics"}


@pytest.mark.parametrize("name", ["spec", "statistics", "tables", "conclusions", "figures"])
def test_tables_and_figures_know_no_torch(name):
    assert not {imported.partition(".")[0] for imported in imports(PACKAGE / f"studies/{name}.py")} & {
        "torch",
        "lightning",
    }


def test_public_names():
    """Every method that has a row of tests, and what makes one's own; each method's file is handed on and has a row."""
    methods = {case.optimizer for case in CASES}
    assert sorted(sam_lightning.__all__) == sorted(
        [*(method.__name__ for method in methods), "SharpnessAware", "norm_layers_only"]
    )
    assert {*sam_lightning.__all__} <= {*optim.__all__}
    written = {
        f"sam_lightning.optim.{path.stem}"
        for path in (PACKAGE / "optim").glob("*.py")
        if "(SharpnessAware):" in path.read_text()
    }
    assert {method.__module__ for method in methods} == written


def test_files_fit_in_the_head():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 240, path
