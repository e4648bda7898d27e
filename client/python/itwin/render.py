"""How jobs look to people: words, numbers, tables in text and HTML."""

import datetime
import html

from itwin import states

COLORS = {"SUCCEEDED": "#2e7d32", "FAILED": "#c62828", "CANCELLED": "#757575", "RUNNING": "#1565c0"}
WAITING_COLOR = "#ef6c00"
BARS = "▁▂▃▄▅▆▇█"


def moment(time_us):
    """A UTC datetime, or None for 0."""
    return datetime.datetime.fromtimestamp(time_us / 1e6, datetime.timezone.utc) if time_us else None


def duration(seconds):
    """"2m10s"."""
    seconds = max(0, int(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def number(value):
    """At most five figures that matter."""
    return f"{value:.5g}"


def fraction(job):
    """Part of the work that is done, 0..1, or None when unknown."""
    progress = job.progress
    if states.name(job.state) == "SUCCEEDED":
        return 1.0
    if progress.steps > 0:
        return min(1.0, progress.step / progress.steps)
    if progress.epochs > 0:
        return min(1.0, max(0, progress.epoch - 1) / progress.epochs)
    return None


def progress_text(job):
    """"epoch 12/40 · step 120/400 · 412 samples/s · 2m10s left"; "" before there is any."""
    progress, parts = job.progress, []
    if progress.epochs:
        parts.append(f"epoch {progress.epoch}/{progress.epochs}")
    if progress.steps:
        parts.append(f"step {progress.step}/{progress.steps}")
    elif progress.step:
        parts.append(f"step {progress.step}")
    if not states.is_final(job.state):
        if progress.samples_per_second > 0:
            parts.append(f"{progress.samples_per_second:.4g} samples/s")
        if progress.seconds_left > 0 and progress.updated_us:
            parts.append(f"{duration(progress.seconds_left)} left")
    return " · ".join(parts)


def place_text(job):
    """" on vega (8 ranks)"."""
    ranks = f" ({job.ranks} rank{'s' if job.ranks != 1 else ''})" if job.ranks else ""
    return f" on {job.site}{ranks}" if job.site else ranks


def headline(job):
    """One line: id, name, state, place, attempt."""
    attempt = f", attempt {job.attempt}" if job.attempt > 1 else ""
    return f"job {job.id[:8]} {job.name or 'unnamed'}: {states.name(job.state)}{place_text(job)}{attempt}"


def is_monitor(name):
    """Series about the machines rather than the model: shown only when asked for."""
    return name.startswith(("node/", "perf/"))


def summary_text(job):
    """The result record's final metrics: "test/rmse 0.2269 · …"."""
    return " · ".join(f"{name} {number(value)}" for name, value in sorted(job.summary.items()) if not is_monitor(name))


def color(job):
    return COLORS.get(states.name(job.state), WAITING_COLOR)


def badge(job):
    return (f'<span style="background:{color(job)};color:white;border-radius:4px;padding:1px 8px;'
            f'font-family:monospace">{html.escape(states.name(job.state))}</span>')


def job_html_head(job):
    attempt = f", attempt {job.attempt}" if job.attempt > 1 else ""
    return (f"{badge(job)} <b>{html.escape(job.name or 'unnamed')}</b> <code>{html.escape(job.id[:8])}</code>"
            f"{html.escape(place_text(job) + attempt)}")


def job_html(job):
    """A small card."""
    lines = [job_html_head(job)]
    for text in (progress_text(job), job.reason, summary_text(job)):
        if text:
            lines.append(html.escape(text))
    return "<div>" + "<br>".join(lines) + "</div>"


JOB_COLUMNS = {
    "id": lambda job: job.id[:8],
    "name": lambda job: job.name,
    "state": lambda job: job.state,
    "site": lambda job: job.site,
    "ranks": lambda job: job.message.ranks,
    "progress": lambda job: progress_text(job.message),
    "created": lambda job: job.created,
    "owner": lambda job: job.message.owner,
}


class Records(list):
    """A list that shows itself as a table. `columns`: title -> function of an item."""

    def __init__(self, items, columns):
        super().__init__(items)
        self._columns = columns

    def rows(self):
        return [[cell(item) for cell in self._columns.values()] for item in self]

    def to_frame(self):
        """As a pandas DataFrame."""
        from itwin.errors import require
        return require("pandas", "to_frame()").DataFrame(self.rows(), columns=list(self._columns))

    def __repr__(self):
        if not self:
            return "(none)"
        rows = [list(self._columns)] + [[_cell(value) for value in row] for row in self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)

    def _repr_html_(self):
        if not self:
            return "<i>none</i>"
        head = "".join(f"<th>{html.escape(title)}</th>" for title in self._columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>"
                       for row in self.rows())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S")
    return str(value)
