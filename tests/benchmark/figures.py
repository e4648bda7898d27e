"""The line of JSON that every benchmark prints for a figure (figures.h does the same in C++)."""
import json


def figure(name, value, unit, reference=0.0, runs=1):
    print(json.dumps({"name": name, "value": value, "unit": unit, "reference": reference,
                      "ratio": value / reference if reference else 0, "runs": runs}), flush=True)
