#!/usr/bin/env python3
"""Electromagnetic showers in a sampling calorimeter, from parameterisations alone: data for the GAN.

Longitudinally a photon's or electron's shower deposits energy as a gamma distribution of the depth t in radiation lengths,

    dE/dt = E · b (b t)^(a - 1) e^(-b t) / Γ(a),      maximum at t = (a - 1) / b = ln(E / Ec) + C

(Particle Data Group, "Passage of particles through matter"; b = 0.5, Ec = 10 MeV, C = +0.5 for photons). From shower to shower the
maximum and the shape fluctuate: ln(t_max) and ln(a) are drawn from normal distributions. Transversally the energy of a layer
falls off as the sum of two exponentials of the distance r from the axis, a narrow core and a wide halo whose share grows with depth:

    dE/dr ∝ r [ (1 - h) e^(-r / core) / core² + h e^(-r / halo) / halo² ],      h = 0.1 + 0.03 t

(in cells of about one Molière radius). Each cell then fluctuates as a sampling calorimeter does: a gamma distribution with the
cell's mean and a variance of 10 %·sqrt(mean · 1 GeV) squared.

    showers.py --samples 4000 --seed 1 --out DIR      # DIR/energy.npy [n, 1], DIR/showers.npy [n, 1, 12, 8, 8]

energy.npy is log10(E / 10 GeV) for E between 10 and 100 GeV; a cell of showers.npy is 10 · (its share of E).
"""

import argparse
import pathlib

import numpy as np

LAYERS, SIDE = 12, 8          # layers of two radiation lengths, 8 × 8 cells
LENGTH = 2.0                  # radiation lengths per layer
CRITICAL_GEV, SHAPE_B = 0.010, 0.5
CORE, HALO = 0.45, 1.4        # in cells
SCALE = 10.0                  # of the cells, so that numbers are of order one


def gamma_cdf(shape, x):
    """Regularised lower incomplete gamma function, by its series; arrays of equal shape."""
    x = np.maximum(x, 1e-12)
    term = np.exp(-x + shape * np.log(x)) / np.exp(np.vectorize(_log_gamma)(shape + 1))
    total = term.copy()
    for n in range(1, 200):
        term = term * x / (shape + n)
        total += term
    return np.clip(total, 0, 1)


def _log_gamma(x):
    import math
    return math.lgamma(x)


def transverse_cells():
    """Share of each cell of the core and of the halo, by a fine grid within the cells."""
    fine = (np.arange(SIDE * 10) + 0.5) / 10 - SIDE / 2
    r = np.hypot(*np.meshgrid(fine, fine, indexing="ij"))
    result = []
    for width in (CORE, HALO):
        density = np.exp(-r / width)
        cells = density.reshape(SIDE, 10, SIDE, 10).sum((1, 3))
        result.append(cells / cells.sum())
    return result


def showers(samples, seed):
    """(energy [n, 1], cells [n, 1, layers, side, side])."""
    draw = np.random.default_rng(seed)
    energy = 10.0 ** draw.uniform(1, 2, samples)  # GeV
    maximum = np.log(energy / CRITICAL_GEV) + 0.5
    maximum = maximum * np.exp(draw.normal(0, 0.12, samples))
    shape = (1 + SHAPE_B * maximum) * np.exp(draw.normal(0, 0.08, samples))
    b = (shape - 1) / maximum
    edges = np.arange(LAYERS + 1) * LENGTH
    below = gamma_cdf(np.repeat(shape[:, None], LAYERS + 1, 1), b[:, None] * edges[None])
    layers = np.diff(below, axis=1)  # share of the energy; what lies behind the last layer leaks out
    core, halo = transverse_cells()
    share = 0.1 + 0.03 * (edges[:-1] + LENGTH / 2)
    profile = (1 - share)[:, None, None] * core + share[:, None, None] * halo
    mean = layers[:, :, None, None] * profile[None]
    variance = (0.1 ** 2) * mean / energy[:, None, None, None]
    cells = draw.gamma(mean ** 2 / variance, variance / mean)
    return (np.log10(energy / 10)[:, None].astype("float32"), (SCALE * cells)[:, None].astype("float32"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."))
    arguments = parser.parse_args()
    energy, cells = showers(arguments.samples, arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    np.save(arguments.out / "energy.npy", energy)
    np.save(arguments.out / "showers.npy", cells)
    print(f"{arguments.samples} showers; mean longitudinal profile", np.round(cells.sum((1, 3, 4)).mean(0) / SCALE, 3))


if __name__ == "__main__":
    main()
