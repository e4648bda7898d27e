"""Curves of metric series with matplotlib: one panel per metric, one line per split."""

import math

from itwin import render
from itwin.errors import require

BUCKETS = 500
MOST_PANELS = 6
MOST_LINES = 12


def panels(names, everything=False):
    """{panel title: [series]}: "train/loss", "train/loss_epoch" and "test/loss" share the panel "loss", which comes first. Monitors
    only with `everything`."""
    groups = {}
    for name in sorted(names):
        if everything or not render.is_monitor(name):
            groups.setdefault(name.rpartition("/")[2].removesuffix("_epoch"), []).append(name)
    titles = sorted(groups, key=lambda title: ("loss" not in title, title))[:MOST_PANELS]
    return {title: groups[title][:MOST_LINES] for title in titles}


def draw_buckets(series, axes=None, title="", everything=False):
    """Draws itwin.v1.SeriesBuckets with pyplot; returns the list of axes."""
    pyplot = require("matplotlib.pyplot", "job.plot()")
    by_name = {buckets.series: buckets for buckets in series}
    groups = panels(by_name, everything)
    if axes is None:
        count = max(1, len(groups))
        columns = min(3, count)
        rows = math.ceil(count / columns)
        figure, grid = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False, layout="constrained")
        axes = list(grid.flat)
        figure.suptitle(title)
    else:
        axes = list(getattr(axes, "flat", axes if isinstance(axes, (list, tuple)) else [axes]))
    for index, axis in enumerate(axes):
        if index >= len(groups):
            axis.set_axis_off()
            if not groups:
                axis.text(0.5, 0.5, "no points yet", ha="center", va="center")
            continue
        name, lines = list(groups.items())[index]
        for line in lines:
            buckets = by_name[line]
            drawn = draw_line(axis, line, buckets.last_step, buckets.last)
            if len(buckets.last) > 1 and list(buckets.min) != list(buckets.max):
                axis.fill_between(buckets.last_step, buckets.min, buckets.max, alpha=0.2, linewidth=0, color=drawn.get_color())
        finish(axis, name)
    return axes[:max(1, len(groups))]


def draw_line(axis, label, steps, values):
    """A curve; a single value, such as a final test score, becomes a dot."""
    return axis.plot(steps, values, label=label, linewidth=1.4, marker="o" if len(steps) == 1 else None)[0]


def finish(axis, title):
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
