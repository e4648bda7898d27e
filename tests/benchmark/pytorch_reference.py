#!/usr/bin/python3
"""PyTorch's side of strategies_benchmark: the same modules, batches, optimiser and threads.

pytorch_reference.py export DIR            writes NAME.pt (TorchScript) and NAME.json (shapes) of each model
pytorch_reference.py train DIR NAME RANKS  trains three epochs and prints samples per second of the last two; with two
                                           ranks by DistributedDataParallel over gloo, one process each
"""
import json
import math
import os
import statistics
import sys
import time

import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))

    def forward(self, x):
        return self.layers(x)


class Block(nn.Module):
    def __init__(self, inner, outer, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.short = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.short(x))


class Resnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                                  Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.body(x).mean([2, 3]))


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(64, 128, 2, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x):
        n, t, w = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        shares = torch.softmax(q.matmul(k.transpose(2, 3)) / math.sqrt(w // self.heads), -1)
        x = x + self.out(shares.matmul(v).transpose(1, 2).reshape(n, t, w))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Attention(128, 4), Attention(128, 4))
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(self.blocks(x).mean(1))


MODELS = {  # module, shape of a sample, samples per rank and step, steps of an epoch
    "mlp": (Mlp, [784], 32, 60),
    "resnet": (Resnet, [3, 32, 32], 32, 12),
    "lstm": (Lstm, [32, 64], 32, 20),
    "transformer": (Transformer, [32, 128], 32, 15),
}


def export(directory):
    for name, (module, shape, batch, steps) in MODELS.items():
        torch.manual_seed(0)
        torch.jit.script(module()).save(os.path.join(directory, name + ".pt"))
        with open(os.path.join(directory, name + ".json"), "w") as out:
            json.dump({"input": shape, "batch": batch, "samples": batch * steps * 2}, out)


def train(rank, ranks, name, port):
    torch.set_num_threads(1)
    module, shape, batch, steps = MODELS[name]
    torch.manual_seed(0)
    net = module()
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=ranks)
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    loss_of = nn.CrossEntropyLoss()
    samples = batch * steps * 2
    x, y = torch.randn(samples, *shape), torch.randint(10, (samples,))
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        order, done = torch.randperm(samples), 0
        mine = order[rank::ranks]
        for first in range(0, len(mine), batch):
            indices = mine[first:first + batch]
            optimizer.zero_grad(set_to_none=ranks == 1)
            loss = loss_of(net(x[indices]), y[indices])
            loss.backward()
            optimizer.step()
            loss.item()  # what one would log
            done += len(indices) * ranks
        rates.append(done / (time.perf_counter() - start))
    if rank == 0:
        print(statistics.median(rates[1:]), flush=True)
    if ranks > 1:
        torch.distributed.destroy_process_group()


def main(arguments):
    if arguments[0] == "export":
        return export(arguments[1])
    name, ranks = arguments[2], int(arguments[3])
    if ranks == 1:
        return train(0, 1, name, 0)
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train, (ranks, name, port), nprocs=ranks)


if __name__ == "__main__":
    main(sys.argv[1:])
