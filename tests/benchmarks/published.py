"""What others do: the loops that ours is measured against, written as they are commonly published."""

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import transforms


class TwoStepSAM(torch.optim.Optimizer):
    """SAM by a loop over parameters, in two calls, with a new copy of each weight that then takes its place."""

    def __init__(self, parameters, base, rho, adaptive=False):
        super().__init__(parameters, {"rho": rho, "adaptive": adaptive})
        self.base_optimizer = base(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        norms = []
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    norms.append(((torch.abs(p) if group["adaptive"] else 1.0) * p.grad).norm(p=2))
        norm = torch.norm(torch.stack(norms), p=2)
        for group in self.param_groups:
            scale = group["rho"] / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old"] = p.data.clone()
                    p.add_((torch.pow(p, 2) if group["adaptive"] else 1.0) * p.grad * scale)

    @torch.no_grad()
    def restore(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]

    def second_step(self):
        self.restore()
        self.base_optimizer.step()


def barest_ascent(parameters: list[nn.Parameter], rho: float) -> list[Tensor]:
    """The fewest operations of a loop over parameters, for SAM alone."""
    norm = torch.norm(torch.stack([p.grad.norm(p=2) for p in parameters]), p=2)
    scale = rho / (norm + 1e-12)
    old = []
    for p in parameters:
        old.append(p.data.clone())
        p.add_(p.grad * scale)
    return old


def leanest(weights, saved, adaptive):
    """Ascent and restoration in multi-tensor operations over all weights, with a kept copy and nothing checked."""
    grads = [w.grad for w in weights]
    torch._foreach_copy_(saved, weights)
    if adaptive:
        T = torch._foreach_abs(weights)
        torch._foreach_add_(T, 0.01)
        grads = torch._foreach_mul(grads, T)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
    if adaptive:
        torch._foreach_mul_(grads, T)
    torch._foreach_add_(weights, grads, alpha=0.05 / norm.item())
    torch._foreach_copy_(weights, saved)


class PaperRun:
    """Study A's SAM arm as the paper's code ran it: torchvision's data with 2 workers, two steps, `.item()`."""

    def __init__(self, root: str, batch_size: int, rho: float, lr: float, device: torch.device) -> None:
        half = transforms.Normalize((0.5,) * 3, (0.5,) * 3)
        data = torchvision.datasets.CIFAR10(root, transform=transforms.Compose([transforms.ToTensor(), half]))
        self.loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, num_workers=2)
        self.network = torchvision.models.resnet18().to(device)
        self.optimizer = TwoStepSAM(
            self.network.parameters(), lambda p: torch.optim.SGD(p, lr=lr, weight_decay=5e-4), rho
        )
        self.device = device

    def batches(self):
        """An iterator whose workers have started; what they have fetched ahead is not counted."""
        iterator = iter(self.loader)
        for _ in range(5):
            next(iterator)
        return iterator

    def train(self, batches, count: int) -> float:
        """Mean loss of so many batches."""
        total = 0.0
        for _, (images, labels) in zip(range(count), batches, strict=False):
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            loss = cross_entropy(self.network(images), labels)
            loss.backward()
            self.optimizer.first_step()
            self.optimizer.zero_grad()
            cross_entropy(self.network(images), labels).backward()
            self.optimizer.second_step()
            total += loss.item()
        return total / count
