"""What SAM costs, as Markdown, from the benchmarks' files in `results/cost`."""

import json
import re
from pathlib import Path

import pandas as pd

HERE = Path(__file__).resolve().parent


def cost_section() -> str:
    """What SAM costs, a table for each machine that was measured."""
    tables = []
    for path in sorted((HERE / "results/cost").glob("*.json")):
        try:
            tables.append(cost_of(json.loads(path.read_text())))
        except KeyError as missing:
            raise SystemExit(f"{path} lacks {missing}: run all benchmarks, with SAM_LIGHTNING_DATA set.") from missing
    return "\n\n".join(tables)


def cost_of(measured: dict) -> str:
    info = {re.sub(r"^test_", "", entry["name"]): entry["extra_info"] for entry in measured["benchmarks"]}
    rows = []

    def add(what, name, other):
        entry = info[name]
        low, high = entry["range"][next(iter(entry["range"]))]
        work = f"{entry['batches']} batches: " if "batches" in entry else ""
        first = entry["seconds"][next(iter(entry["seconds"]))]
        rows.append(
            {
                "ours / other": what,
                "ratio": f"{entry['ratio'][other]:.3f}",
                "aim": str(entry["bound"]) if other == next(iter(entry["ratio"])) else "",
                "": "missed" if other == next(iter(entry["ratio"])) and entry["ratio"][other] > entry["bound"] else "",
                "ours": f"{work}{shown(first)} ({shown(low)} to {shown(high)})",
                "n": entry["n"],
            }
        )

    for variant in ("SAM", "ASAM"):
        add(
            f"{variant}'s step / two gradients and a step of SGD",
            f"a_step_against_its_floor[{variant}]",
            "two gradients and a step",
        )
    for network, label in (("resnet18", "ResNet-18"), ("many_small", "1,000 weights of 32x32")):
        for other in ("published loop", "barest loop", "pytorch_optimizer"):
            add(f"ascent and restoration, {label} / {other}", f"b_ascent_and_restoration[{network}]", other)
    add("`fit` with its logs and a checkpoint / a bare loop", "c_an_epoch_of_fit", "bare loop")
    for augmented, label in ((False, "plain"), (True, "crops and flips")):
        add(f"batches, {label} / torchvision, 2 workers", f"d_batches[{augmented}]", "torchvision, 2 workers")
    for name, entry in info.items():
        if name.startswith("e_"):
            add(f"study A's SAM, {next(iter(entry['seconds']))} / the paper's way", name, "the paper's way")
    seconds = info["f_startup"]["seconds"]
    more = {
        "import sam_lightning": "import torch",
        "sam-lightning --help": "import lightning.pytorch.cli",
        "sam-lightning study run --dry-run": "import torch",
    }
    starts = "; ".join(
        f"`{ours}` {seconds[ours] - seconds[other]:+.2f} s beside `{other}`" for ours, other in more.items()
    )
    parts = "; ".join(
        f"{variant}: "
        + ", ".join(
            f"{part} {shown(value)}" for part, value in info[f"h_where_the_time_goes[{variant}]"]["seconds"].items()
        )
        for variant in ("SAM", "ASAM")
    )
    factors = " and ".join(
        f"{variant}'s step takes {factor(info[f'h_where_the_time_goes[{variant}]'])}" for variant in ("SAM", "ASAM")
    )
    one, commit = info["c_an_epoch_of_fit"], measured["commit_info"]
    machine = measured["machine_info"]["cpu"].get("brand_raw", "CPU") if one["device"] == "cpu" else one["device"]
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    return "\n".join(
        [
            f"On {one['threads']} cores of {machine}, float32 where nothing else is said, {versions}, commit "
            f"{commit['id'][:12]}{' with changes' if commit['dirty'] else ''}; medians of n rounds in turn, all "
            "with freed memory kept, as the command line does. Ratios below 1: ours is faster; aim: at most.",
            "",
            pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
            "",
            f"{factors} times a step of SGD. Where a step's time goes (batch 128): {parts}. Start: {starts}. "
            "Memory: SAM's peak is SGD's and "
            f"{info['g_memory']['copies']:.2f} copies of the weights (aim: 1).",
        ]
    )


def factor(step: dict) -> str:
    """A step's time in steps of SGD, which are a gradient and a descent."""
    seconds = step["seconds"]
    return f"{sum(seconds.values()) / (seconds['first gradient'] + seconds['descent']):.2f}"


def shown(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
