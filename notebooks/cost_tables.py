"""What SAM costs, as Markdown, from the benchmarks' files in `results/cost`."""

import json
import re
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent


def cost_section() -> str:
    """What SAM costs, a section for each machine that was measured."""
    files = sorted((HERE / "results/cost").glob("*.json"))
    return "\n\n".join(cost_of(json.loads(path.read_text())) for path in files)


def cost_of(measured: dict) -> str:
    """What was measured on one machine: nothing is said of benchmarks that were not run."""
    info = {re.sub(r"^test_", "", entry["name"]): entry["extra_info"] for entry in measured["benchmarks"]}
    one, commit = info["a_step_against_its_floor[SAM]"], measured["commit_info"]
    processor = measured["machine_info"]["cpu"].get("brand_raw", "CPU")
    machine = f"{one['threads']} cores of {processor}" if one["device"] == "cpu" else one["device"]
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    return "\n".join(
        [
            f"### {machine}",
            "",
            f"Float32 where nothing else is said, {versions}, commit {commit['id'][:12]}"
            f"{' with changes' if commit['dirty'] else ''}; medians of n rounds in turn"
            f"{', freed memory kept as the command line keeps it' if one['device'] == 'cpu' else ''}. "
            "Ratios below 1: ours is faster; aim: at most.",
            "",
            pd.DataFrame(ratios(info)).to_markdown(index=False, disable_numparse=True),
            "",
            *method_lines(info),
            " ".join(remarks(info)),
        ]
    )


def ratios(info: dict) -> list[dict]:
    """A row for each comparison."""
    compared = [
        (f"{variant}'s step / two gradients and a step of SGD", f"a_step_against_its_floor[{variant}]", None)
        for variant in ("SAM", "ASAM")
    ]
    compared += [
        (f"ascent and restoration, {label} / {other}", f"b_ascent_and_restoration[{network}]", other)
        for network, label in (("resnet18", "ResNet-18"), ("many_small", "1,000 weights of 32x32"))
        for other in ("published loop", "barest loop", "pytorch_optimizer")
    ]
    compared += [
        (f"ascent and restoration, {variant}, 1e8 weights in 400 {dtype} tensors, 1 thread / leanest loop", name, None)
        for variant in ("SAM", "ASAM")
        for dtype in ("float32", "bfloat16")
        for name in [f"b_a_hundred_million_weights[{variant}-{dtype}]"]
    ]
    compared.append(("`fit` with its logs and two checkpoints / a bare loop", "c_an_epoch_of_fit", None))
    compared += [
        (f"batches, {label} / torchvision, 2 workers", f"d_batches[{augmented}]", None)
        for augmented, label in ((False, "plain"), (True, "crops and flips"))
    ]
    compared += [
        (f"study A's SAM, {next(iter(entry['seconds']))} / the paper's way", name, None)
        for name, entry in info.items()
        if name.startswith("e_")
    ]
    return [row(what, info[name], other) for what, name, other in compared if name in info]


def row(what: str, entry: dict, other: str | None) -> dict:
    """Ours against another; the first other has the aim."""
    ours, first = next(iter(entry["seconds"])), next(iter(entry["ratio"]))
    other = other or first
    ratio, work = entry["ratio"][other], f"{entry['batches']} batches: " if "batches" in entry else ""
    low, high = entry["range"][ours]
    return {
        "ours / other": what,
        "ratio": f"{ratio:.3f}",
        "aim": str(entry["bound"]) if other == first else "",
        "": "missed" if other == first and ratio > entry["bound"] else "",
        "ours": f"{work}{shown(entry['seconds'][ours])} ({shown(low)} to {shown(high)})",
        "n": entry["n"],
    }


def method_lines(info: dict) -> list[str]:
    """A step of every method in steps of SGD, and the memory that it takes."""
    networks = {"digits' network": "i_methods[digits]", "ResNet-18": "i_methods[resnet18]"}
    if not set(networks.values()) <= info.keys():
        return []
    copies = info["i_memory"]["copies"]

    def ratio(name: str, method: str) -> str:
        seconds = info[name]["seconds"]
        return f"{seconds[method] / seconds['SGD']:.2f}"

    rows = [
        {
            "method": method,
            **{f"{network}, n = {info[name]['n']}": ratio(name, method) for network, name in networks.items()},
            "copies of the weights": f"{copies[method]:.1f}" if method in copies else "",
        }
        for method in info["i_methods[digits]"]["seconds"]
    ]
    table = pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)
    return ["Time of a step in steps of SGD, and the most memory beside what SGD needs:", "", table, ""]


def remarks(info: dict) -> list[str]:
    """Where the time goes, what a start and a run's memory come to."""
    said = []
    parts = {variant: info.get(f"h_where_the_time_goes[{variant}]") for variant in ("SAM", "ASAM")}
    if all(parts.values()):
        factors = " and ".join(f"{variant}'s step takes {factor(step)}" for variant, step in parts.items())
        times = "; ".join(
            f"{variant}: " + ", ".join(f"{part} {shown(value)}" for part, value in step["seconds"].items())
            for variant, step in parts.items()
        )
        said.append(f"{factors} times a step of SGD. Where a step's time goes (batch 128): {times}.")
        outside = {variant: step.get("share outside kernels") for variant, step in parts.items()}
        if all(outside.values()):
            shares = " and ".join(f"{share:.0%} of {variant}'s step" for variant, share in outside.items())
            said.append(f"The GPU waits for the host in {shares}.")
    if "f_startup" in info:
        seconds = info["f_startup"]["seconds"]
        more = {
            "import sam_lightning": "import torch",
            "sam-lightning --help": "import lightning.pytorch.cli",
            "sam-lightning study run --dry-run": "import torch",
        }
        starts = "; ".join(
            f"`{own}` {seconds[own] - seconds[other]:+.2f} s beside `{other}`" for own, other in more.items()
        )
        said.append(f"Start: {starts}.")
    fit = info.get("c_an_epoch_of_fit", {})
    if "checkpoints" in fit:
        said.append(
            f"Of `fit`'s {fit['batches']} batches its two checkpoints take {shown(fit['checkpoints'])}, as in "
            f"study A's epoch of 391; without them the ratio is {fit['without_checkpoints']:.3f}."
        )
    lean = {name: entry["copies"] for name, entry in info.items() if name.startswith("b_a_hundred_million")}
    if lean:
        names = {name: re.sub(r".*\[(.*)-(.*)\]", r"\1 in \2", name) for name in lean}
        copies = ", ".join(f"{names[name]} {count:.2f}" for name, count in lean.items())
        said.append(f"Of 1e8 weights ascent and restoration take so many copies beside the gradients: {copies}.")
    if "g_memory" in info:
        said.append(f"Memory: SAM's peak is SGD's and {info['g_memory']['copies']:.2f} copies of the weights (aim: 1).")
    return said


def factor(step: dict) -> str:
    """A step's time in steps of SGD, which are a gradient and a descent."""
    seconds = step["seconds"]
    return f"{sum(seconds.values()) / (seconds['first gradient'] + seconds['descent']):.2f}"


def shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
