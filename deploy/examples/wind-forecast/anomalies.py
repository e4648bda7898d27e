#!/usr/bin/env python3
"""The wind's departures from the usual over the tropical Pacific, month by month: anomalies.cdf for job.yaml, in the current
directory.

    anomalies.py [FILE]        default: /usr/share/ferret-vis/data/monthly_navy_winds.cdf (Debian's package ferret-datasets)

Both components, as means over boxes of 20 by 35 degrees between 20° S and 20° N, 140° E and 80° W, less the mean of that calendar
month in the training years, 1982 to 1990. The year's course is so taken out, which forecasting "as always at this time of the
year" would get right, too; what is left are months out of the ordinary, such as El Niño's.

Prints what two forecasts without a model miss in 1991 and 1992, in standard deviations of the training months as the job's
test/rmse: climatology (no departure) and persistence (the departure of the month before), and persistence times the factor that
serves the training months best. Needs NumPy and SciPy.
"""
import sys

import numpy as np
from scipy.io import netcdf_file

WINDS = "/usr/share/ferret-vis/data/monthly_navy_winds.cdf"
TRAINING = 108  # months, from January 1982; the rest is the test
SOUTH, NORTH, WEST, EAST = -20, 20, 140, 280
BOX = (8, 14)  # rows and columns of 2.5 degrees


def anomalies(winds):
    """{name: [months, 2, 4]} and the time axis (values, units)."""
    with netcdf_file(winds, mmap=False) as file:
        latitude, longitude = file.variables["FNOCY"][:], file.variables["FNOCX"][:] % 360
        rows = np.flatnonzero((latitude >= SOUTH) & (latitude < NORTH))
        columns = np.flatnonzero((longitude >= WEST) & (longitude < EAST))
        result = {}
        for name in ("UWND", "VWND"):
            field = file.variables[name][:].astype("f8")[:, rows][:, :, columns]
            months = len(field)
            boxes = field.reshape(months, len(rows) // BOX[0], BOX[0], len(columns) // BOX[1], BOX[1]).mean((2, 4))
            usual = boxes[:TRAINING].reshape(-1, 12, *boxes.shape[1:]).mean(0)
            result[name] = (boxes - usual[np.arange(months) % 12]).astype("f4")
        time = file.variables["TIME"]
        return result, (time[:].copy(), time.units)


def baselines(fields):
    """Root mean square errors of forecasts without a model, for the months of the test."""
    field = np.stack([values / values[:TRAINING].std() for values in fields.values()], axis=1)
    month, before = field[TRAINING:], field[TRAINING - 1:-1]
    known, known_before = field[1:TRAINING], field[:TRAINING - 1]
    factor = (known * known_before).sum() / (known_before ** 2).sum()
    return {name: float(np.sqrt(((month - forecast) ** 2).mean())) for name, forecast in
            (("climatology", 0), ("persistence", before), ("damped_persistence", factor * before))}


def main(winds=WINDS):
    fields, (time, units) = anomalies(winds)
    with netcdf_file("anomalies.cdf", "w") as out:
        for name, size in zip(("TIME", "box_row", "box_column"), (len(time), *fields["UWND"].shape[1:])):
            out.createDimension(name, size)
        axis = out.createVariable("TIME", "f8", ("TIME",))
        axis[:], axis.units = time, units
        for name, values in fields.items():
            out.createVariable(name, "f4", ("TIME", "box_row", "box_column"))[:] = values
    print(f"{len(time)} months; the test's errors are", ", ".join(f"{k} {v:.3f}" for k, v in baselines(fields).items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
