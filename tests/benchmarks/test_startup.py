"""(f) Seconds until a command answers; (g) memory at its highest. Each in processes of its own."""

import statistics
import subprocess
import sys
from functools import partial

import pytest
from alternating import DEVICE, conditions

pytestmark = [pytest.mark.benchmarks, pytest.mark.timeout(1800)]

COMMANDS = {
    "import sam_lightning": ["-c", "import sam_lightning"],
    "import torch": ["-c", "import torch"],
    "sam-lightning --help": ["-m", "sam_lightning", "--help"],
    "import lightning.pytorch.cli": ["-c", "import lightning.pytorch.cli"],
    "sam-lightning study run --dry-run": ["-m", "sam_lightning", "study", "run", "a", "--dry-run"],
}


def test_f_startup(compare):
    def run(words):
        subprocess.run([sys.executable, *words], check=True, capture_output=True)

    compare(5, {name: partial(run, words) for name, words in COMMANDS.items()}, bound="0.2 s and 0.5 s more")


TRAINING = """
import sys, torch
from functools import partial
from pathlib import Path
from sam_lightning import SAM
from sam_lightning.cli.malloc import keep_freed_memory
from sam_lightning.models import resnet18
keep_freed_memory()
device = sys.argv[2]
network = resnet18().to(device)
sgd = partial(torch.optim.SGD, lr=0.01)
optimizer = SAM(network.named_parameters(), sgd) if sys.argv[1] == "SAM" else sgd(network.parameters())
images, labels = torch.rand(128, 3, 32, 32, device=device), torch.randint(0, 10, (128,), device=device)
def gradient():
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(network(images), labels).backward()
for _ in range(4):
    gradient()
    if sys.argv[1] == "SAM":
        with optimizer.perturbed():
            gradient()
    optimizer.step()
if device == "cuda":
    peak = torch.cuda.max_memory_allocated()
else:  # not getrusage's ru_maxrss, which a process inherits from the one that started it
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    peak = int(line.split()[1]) * 1024
print(peak, sum(p.nbytes for p in network.parameters()))
"""


def test_g_memory(benchmark):
    rounds = 5
    peaks = {"SAM": [], "SGD": []}

    def measure():
        for _ in range(rounds):
            for name, found in peaks.items():
                words = [sys.executable, "-c", TRAINING, name, DEVICE.type]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                peak, weights = map(int, done.stdout.split())
                found.append(peak)
        return weights

    weights = benchmark.pedantic(measure, rounds=1)
    medians = {name: statistics.median(found) for name, found in peaks.items()}
    copies = (medians["SAM"] - medians["SGD"]) / weights
    benchmark.extra_info.update(
        {"n": rounds, "bytes": medians, "weights": weights, "copies": copies, "bound": 1, **conditions()}
    )
    print(f"\nSAM's peak is SGD's and {copies:.2f} copies of the weights")
