#!/usr/bin/env python3
"""Turns the JSON lines of the benchmark programs into bench.json and a table; compares two bench.json."""
import json
import sys


def number(value):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def table(rows, heads):
    widths = [max(len(str(row[i])) for row in [heads] + rows) for i in range(len(heads))]
    for row in [heads] + rows:
        print("  ".join(str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


def main(arguments):
    if arguments[0] == "--compare":
        old, new = ({f["name"]: f for f in json.load(open(path))} for path in arguments[1:3])
        rows = []
        for name in sorted(set(old) | set(new)):
            a, b = old.get(name), new.get(name)
            change = f"{b['value'] / a['value']:.3f}" if a and b and a["value"] else "-"
            rows.append([name, number(a["value"]) if a else "-", number(b["value"]) if b else "-",
                         (b or a)["unit"], change])
        table(rows, ["figure", "old", "new", "unit", "new/old"])
        return
    figures = []
    for line in open(arguments[0]):
        if line.startswith("{"):
            figures.append(json.loads(line))
    with open(arguments[1], "w") as out:
        json.dump(figures, out, indent=1)
        out.write("\n")
    print()
    table([[f["name"], number(f["value"]), f["unit"], number(f["reference"]) if f["reference"] else "-",
            f"{f['ratio']:.3f}" if f["ratio"] else "-", f["runs"]] for f in figures],
          ["figure", "value", "unit", "reference", "ratio", "runs"])
    print(f"\n{len(figures)} figures in {arguments[1]}")


main(sys.argv[1:])
