#!/usr/bin/env python3
"""The GAN of the calorimeter example as a TorchScript module with two training steps, one per optimizer.

    gan_model.py gan.pt

The generator makes a shower from 16 random numbers and the energy, with three-dimensional convolutions (as 3DGAN does); the
discriminator tells real showers from made ones and, as in 3DGAN, estimates their energy. Auxiliary terms keep the generator on the
physics: the energy that the discriminator sees in its showers; their profiles by layer and by distance from the axis, as means over
the batch; how the longitudinal profile changes with the energy (its slope over the batch); and how far showers differ from each other
in their total energy, their depth and the number of cells that they hit (deviations over the batch).
"""

import sys
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, SIDE, NOISE = 12, 8, 16


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.start = nn.Linear(NOISE + 1, 12 * 6 * 4 * 4)
        self.first = nn.Conv3d(12, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 8, 3, padding=1)
        self.last = nn.Conv3d(8, 1, 3, padding=1)
        self.level = nn.Parameter(torch.zeros(1, 1, LAYERS, SIDE, SIDE))  # logarithm of each cell's share, on average
        self.total = nn.Linear(NOISE + 1, 1)  # what does not leak out

    def forward(self, noise: Tensor, energy: Tensor) -> Tensor:
        seed = torch.cat([noise, energy], 1)
        x = F.leaky_relu(self.start(seed), 0.2).view(-1, 12, 6, 4, 4)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.leaky_relu(self.first(x), 0.2)
        x = F.leaky_relu(self.second(x), 0.2)
        level = self.last(x) + self.level
        shares = torch.softmax(level.flatten(1), 1).view_as(level)
        return 10.0 * torch.sigmoid(4.0 + self.total(seed)).view(-1, 1, 1, 1, 1) * shares


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, stride=2, padding=1)
        self.second = nn.Conv3d(8, 16, 3, stride=2, padding=1)
        self.drop = nn.Dropout(0.2)
        self.real = nn.Linear(16 * 3 * 2 * 2 + 1, 1)
        self.energy = nn.Linear(16 * 3 * 2 * 2, 1)

    def forward(self, shower: Tensor, energy: Tensor) -> Tuple[Tensor, Tensor]:
        x = torch.log(shower + 1e-3)
        x = F.leaky_relu(self.first(x), 0.2)
        x = self.drop(F.leaky_relu(self.second(x), 0.2).flatten(1))
        return self.real(torch.cat([x, energy], 1)), self.energy(x)


class ShowerGan(nn.Module):
    def __init__(self):
        super().__init__()
        self.noise = NOISE
        self.generator = Generator()
        self.discriminator = Discriminator()
        grid = torch.arange(SIDE, dtype=torch.float32) - (SIDE - 1) / 2
        distance = (grid[:, None] ** 2 + grid[None, :] ** 2).sqrt().round().long()  # rings of one cell
        rings = F.one_hot(distance).permute(2, 0, 1).float()
        self.register_buffer("rings", rings)
        self.register_buffer("depth", torch.arange(LAYERS, dtype=torch.float32))

    def forward(self, energy: Tensor) -> Tensor:
        """Showers for given energies, from fresh random numbers."""
        return self.generator(torch.randn(energy.size(0), self.noise, device=energy.device), energy)

    def profiles(self, showers: Tensor) -> Tuple[Tensor, Tensor]:
        """Energy by layer, and by ring, of each shower."""
        return showers.sum([1, 3, 4]), torch.einsum("nclxy,rxy->nr", showers, self.rings)

    def statistics(self, showers: Tensor, energy: Tensor) -> Tensor:
        """What a batch of showers has in common with another one of these energies, if both are good."""
        layers, rings = self.profiles(showers)
        about = energy - energy.mean()
        slope = (about * layers).mean(0) / (about.square().mean() + 1e-3)
        total = layers.sum(1)
        depth = (layers * self.depth).sum(1) / total
        hits = torch.sigmoid((showers - 0.02) / 0.005).sum([1, 2, 3, 4])  # cells with more than 0.2 % of the energy, softly
        each = torch.stack([4.0 * total, depth, 0.2 * hits])  # scaled so that their deviations are of order one
        deviations = (each.var(1, unbiased=False) + 1e-6).sqrt()  # a batch of one is no error
        return torch.cat([layers.mean(0), rings.mean(0), slope, deviations, 0.02 * hits.mean().view(1)])

    @torch.jit.export
    def discriminator_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        energy, real = batch["input"], batch["target"]
        with torch.no_grad():
            made = self.forward(energy)
        seen_real, energy_real = self.discriminator(real, energy)
        seen_made, _ = self.discriminator(made, energy)
        loss = (F.binary_cross_entropy_with_logits(seen_real, torch.full_like(seen_real, 0.9))
                + F.binary_cross_entropy_with_logits(seen_made, torch.zeros_like(seen_made)) + F.mse_loss(energy_real, energy))
        return loss, {}

    @torch.jit.export
    def generator_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        energy, real = batch["input"], batch["target"]
        made = self.forward(energy)
        seen, guessed = self.discriminator(made, energy)
        physics = (self.statistics(made, energy) - self.statistics(real, energy)).abs().sum()
        loss = F.binary_cross_entropy_with_logits(seen, torch.ones_like(seen)) + F.mse_loss(guessed, energy) + 0.5 * physics
        return loss, {}

    @torch.jit.export
    def evaluation_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        """How far the mean profiles of made showers are from those of the batch, relative to the energy. A mean over many small
        batches would be too pessimistic: use a large batch, or quality.py."""
        made, real = self.forward(batch["input"]), batch["target"]
        layers, rings = self.profiles(made)
        real_layers, real_rings = self.profiles(real)
        longitudinal = (layers.mean(0) - real_layers.mean(0)).abs().sum() / real_layers.mean(0).sum()
        transverse = (rings.mean(0) - real_rings.mean(0)).abs().sum() / real_rings.mean(0).sum()
        return longitudinal + transverse, {"longitudinal": longitudinal, "transverse": transverse}


if __name__ == "__main__":
    torch.manual_seed(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
    torch.jit.script(ShowerGan()).save(sys.argv[1])
