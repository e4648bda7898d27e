#!/usr/bin/env python3
"""How good a trained generator is: its showers against those of showers.py, for energies that the training has not seen.

    quality.py model.pt [--samples 2000] [--seed 7]

Exit code 1, and what is beyond its limit, unless
- the mean longitudinal and transverse profiles are within 0.15, for all showers together and in each of three ranges of energy. The
  distance of two profiles is the sum of absolute differences over the sum;
- the centre of gravity moves deeper from the lowest range to the highest as it does in real showers (ln E), give or take 40 %;
- showers differ from each other: the deviations of their total energy and of their number of hit cells are between half and twice
  those of real showers.
A shower that is always the mean one has the right profiles over all energies, but none of the rest; an untrained generator has the
profiles wrong and knows nothing of the energy. The training is told of all these figures by gan_model.py (its `statistics`), so they say that
the training has worked, not that the showers are right in whatever else one may look at.
"""

import argparse
import sys

import numpy as np
import torch

import showers

PROFILE = 0.15          # distance of profiles, at most
RISE = (0.6, 1.4)       # of the centre of gravity with the energy, over that of real showers
SPREAD = (0.5, 2.0)     # deviation of a number per shower, over that of real showers
HIT = 0.02              # a cell with 0.2 % of the energy is hit


def profiles(cells):
    """(by layer, by distance from the axis in cells), means over showers."""
    axis = np.arange(showers.SIDE) - (showers.SIDE - 1) / 2
    ring = np.rint(np.hypot(axis[:, None], axis[None])).astype(int)
    flat = cells.sum((1, 2)).mean(0)
    return cells.sum((1, 3, 4)).mean(0), np.array([flat[ring == r].sum() for r in range(ring.max() + 1)])


def distance(a, b):
    return float(np.abs(a - b).sum() / np.abs(b).sum())


def centre(layers):
    """Centre of gravity of a longitudinal profile, in radiation lengths."""
    depth = (np.arange(showers.LAYERS) + 0.5) * showers.LENGTH
    return float((layers * depth).sum() / layers.sum())


def measure(generate, samples, seed):
    """The figures that `judge` looks at: profiles and their distances, the worst of them in a range of energy, centres of gravity by
    energy, and ratios to real showers."""
    energy, real = showers.showers(samples, seed)
    made = generate(energy)
    (layers, rings), (real_layers, real_rings) = profiles(made), profiles(real)
    longitudinal, transverse, centres, real_centres = [], [], [], []
    for low in (0, 1 / 3, 2 / 3):
        chosen = (energy[:, 0] >= low) & (energy[:, 0] < low + 1 / 3)
        (by_layer, by_ring), (real_by_layer, real_by_ring) = profiles(made[chosen]), profiles(real[chosen])
        longitudinal.append(distance(by_layer, real_by_layer))
        transverse.append(distance(by_ring, real_by_ring))
        centres.append(centre(by_layer))
        real_centres.append(centre(real_by_layer))
    spread = {name: float(number(made).std() / number(real).std()) for name, number in
              (("total", lambda cells: cells.sum((1, 2, 3, 4))), ("hits", lambda cells: (cells > HIT).sum((1, 2, 3, 4))))}
    return {"longitudinal": distance(layers, real_layers), "transverse": distance(rings, real_rings),
            "worst_longitudinal": max(longitudinal), "worst_transverse": max(transverse),
            "centres": centres, "real_centres": real_centres,
            "rise": (centres[2] - centres[0]) / (real_centres[2] - real_centres[0]),
            "total_spread": spread["total"], "hits_spread": spread["hits"],
            "layers": layers, "real_layers": real_layers, "rings": rings, "real_rings": real_rings}


def judge(found):
    """[(figure, value, lowest, highest)] of what is beyond its limits."""
    limits = {"longitudinal": (0, PROFILE), "transverse": (0, PROFILE), "worst_longitudinal": (0, PROFILE),
              "worst_transverse": (0, PROFILE), "rise": RISE, "total_spread": SPREAD, "hits_spread": SPREAD}
    return [(name, found[name], *limit) for name, limit in limits.items() if not limit[0] <= found[name] <= limit[1]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    model = torch.jit.load(arguments.model).eval()
    with torch.no_grad():
        found = measure(lambda energy: model(torch.from_numpy(energy)).numpy(), arguments.samples, arguments.seed)
    for name in ("layers", "rings", "centres"):
        print(name, "generator", np.round(found[name], 3), "showers", np.round(found["real_" + name], 3))
    print(", ".join(f"{name} {found[name]:.3f}" for name in ("longitudinal", "transverse", "worst_longitudinal",
                                                             "worst_transverse", "rise", "total_spread", "hits_spread")))
    beyond = judge(found)
    for name, value, low, high in beyond:
        print(f"{name} is {value:.3f}; wanted: {low} to {high}")
    print("not good enough" if beyond else "ok")
    return 1 if beyond else 0


if __name__ == "__main__":
    sys.exit(main())
