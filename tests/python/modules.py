"""Modules for the hand-over tests: in a file, because TorchScript reads their source."""

from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, inputs=3, outputs=2):
        super().__init__()
        self.first = nn.Linear(inputs, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


class OwnStep(Net):
    def training_step(self, batch: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        error = self.forward(batch["input"]) - batch["target"]
        return (error ** 2).mean(), {"mae": error.abs().mean()}


class VectorMetric(Net):
    def training_step(self, batch: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        error = self.forward(batch["input"]) - batch["target"]
        return (error ** 2).mean(), {"mae": error.abs()}


class OtherSignature(Net):
    def training_step(self, input, target):
        return ((self.forward(input) - target) ** 2).mean()


class FixedDropout(Net):
    def forward(self, x):
        return self.last(F.dropout(self.first(x), 0.5, True))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


class StarArgs(Net):
    def forward(self, *args):
        return self.last(args[0])


class TryExcept(Net):
    def forward(self, x):
        try:
            return self.last(x)
        except ValueError:
            return x


class UsesNumpy(Net):
    def forward(self, x):
        import numpy as np
        return self.last(torch.from_numpy(np.tanh(x.numpy())))


class LambdaInside(Net):
    def forward(self, x):
        f = lambda y: y * 2  # noqa: E731
        return f(x)


class Unconvertible(Net):
    def __init__(self):
        super().__init__()
        self.table = object()

    def forward(self, x):
        return self.last(x) + self.table.shift


class ChangesType(Net):
    def forward(self, x):
        y = x
        if x.sum() > 0:
            y = 3
        return y


class NoGrad(Net):
    def forward(self, x):
        return self.last(self.first(x)).detach()


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


class CallsSuper(Net):
    def forward(self, x):
        return super().forward(x)


class ReturnsTwo(Net):
    def forward(self, x):
        y = self.last(self.first(x))
        return y, y
