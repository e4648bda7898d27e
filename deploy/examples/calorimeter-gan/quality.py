#!/usr/bin/env python3
"""How good a trained generator is: the mean longitudinal and transverse profiles of its showers against those of showers.py.

    quality.py model.pt [--samples 2000] [--seed 7]

Prints both profiles and their distance: the sum of absolute differences over the sum, for showers of the same energies that the
training has not seen. Exit code 1 beyond 0.25 for either (untrained: about 0.7 and 1.3). The generator's profiles are also
compared in three ranges of energy; the depth of the maximum must rise with the energy, as ln E.
"""

import argparse
import sys

import numpy as np
import torch

import showers

THRESHOLD = 0.25


def profiles(cells):
    """(by layer, by distance from the axis in cells), means over showers."""
    axis = np.arange(showers.SIDE) - (showers.SIDE - 1) / 2
    ring = np.rint(np.hypot(axis[:, None], axis[None])).astype(int)
    flat = cells.sum((1, 2)).mean(0)
    return cells.sum((1, 3, 4)).mean(0), np.array([flat[ring == r].sum() for r in range(ring.max() + 1)])


def distance(a, b):
    return float(np.abs(a - b).sum() / np.abs(b).sum())


def measure(generate, samples, seed):
    """{"longitudinal": …, "transverse": …, "maximum": [depths of the maximum in three ranges of energy]}"""
    energy, real = showers.showers(samples, seed)
    made = generate(energy)
    (layers, rings), (real_layers, real_rings) = profiles(made), profiles(real)
    depth = (np.arange(showers.LAYERS) + 0.5) * showers.LENGTH
    centres = []
    for low in (0, 1 / 3, 2 / 3):
        chosen = (energy[:, 0] >= low) & (energy[:, 0] < low + 1 / 3)
        by_layer = made[chosen].sum((1, 3, 4)).mean(0)
        centres.append(float((by_layer * depth).sum() / by_layer.sum()))
    return {"longitudinal": distance(layers, real_layers), "transverse": distance(rings, real_rings), "centres": centres,
            "layers": layers, "real_layers": real_layers, "rings": rings, "real_rings": real_rings}


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
    for name in ("layers", "rings"):
        print(name, "generator", np.round(found[name], 3), "showers", np.round(found["real_" + name], 3))
    print("centre of gravity by energy, radiation lengths", np.round(found["centres"], 2))
    good = found["longitudinal"] <= THRESHOLD and found["transverse"] <= THRESHOLD
    print(f"longitudinal {found['longitudinal']:.3f}, transverse {found['transverse']:.3f}: "
          f"{'ok' if good else f'beyond {THRESHOLD}'}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
