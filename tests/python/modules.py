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


# ---- families that are exported and trained at the worker ------------------------------------------------------------


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 3))

    def forward(self, x):
        return self.layers(x.flatten(1))


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.second(F.relu(self.norm(self.first(x)))))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.blocks = nn.Sequential(Residual(6), Residual(6))
        self.head = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x):
        y = self.blocks(F.relu(self.norm(self.stem(x)))) + 1
        y = F.max_pool2d(y, 2)
        return self.head(y.view(y.size(0), -1))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.LSTM(3, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        states, _ = self.cells(x)
        return self.head(states[:, -1])


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1, 6, 16))
        self.qkv, self.merge = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = x + self.place
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)
        q, k, v = [part.reshape(x.shape[0], x.shape[1], 4, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]
        weights = (q @ k.transpose(-2, -1) / 2.0 + mask).softmax(-1)
        x = self.first(x + self.merge(self.drop(weights @ v).transpose(1, 2).reshape(x.shape)))
        x = self.second(x + self.drop(self.narrow(F.gelu(self.wide(x)))))
        return self.head(x.mean(1))


class Encoder(nn.Module):
    """torch's own layer, which TorchScript takes only with a fixed training flag."""

    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.block(x).mean(1))


class GraphOnly(nn.Module):
    """What TorchScript does not take: a comprehension over a dict, and *args."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(3, 4)})
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, *inputs):
        parts = {name: part(inputs[0]) for name, part in self.parts.items()}
        return self.head(self.drop(self.norm(sum(parts.values()))))


class GraphOnlyStep(GraphOnly):
    def training_step(self, batch):
        error = self.forward(batch["input"]) - batch["target"]
        return (error ** 2).mean(), {"mae": error.abs().mean()}


class FixedBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, *inputs):
        rows = len(inputs[0])
        return self.head(inputs[0]) + torch.zeros(int(rows), 2)


class LoopsOverSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, *inputs):
        return torch.stack([self.head(row) for row in inputs[0]])


class TakesNumberOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, *inputs):
        return self.head(inputs[0]) * inputs[0].sum().item()


class BranchesByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, *inputs):
        if inputs[0].sum() > 0:
            return self.head(inputs[0])
        return -self.head(inputs[0])


class ReadsFiles(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) + torch.from_file("/etc/hostname", False, 1).sum()


class TwoSteps(nn.Module):
    """Two parts, each with a step of its own that the other's parameters take part in."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 4)
        self.b = nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))

    @torch.jit.export
    def a_step(self, batch: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        return F.mse_loss(self.forward(batch["input"]), batch["target"]), {}

    @torch.jit.export
    def b_step(self, batch: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        return F.l1_loss(self.forward(batch["input"]), batch["target"]), {}

    @torch.jit.export
    def evaluation_step(self, batch: Dict[str, torch.Tensor]) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        return F.mse_loss(self.forward(batch["input"]), batch["target"]), {}


class State(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(1)

    def forward(self, x):
        return x * self.scale

    @torch.jit.export
    def __getstate__(self) -> Tuple[torch.Tensor, bool]:
        return self.scale, self.training

    @torch.jit.export
    def __setstate__(self, state: Tuple[torch.Tensor, bool]):
        self.scale = state[0]
        self.training = state[1]


class WithState(Net):
    def __init__(self):
        super().__init__()
        self.state = State()

    def forward(self, x):
        return self.last(self.state(self.first(x)))
