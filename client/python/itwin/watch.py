"""Watching a job: a live view in a notebook, lines of text elsewhere."""

import sys
import time

from itwin import render, states
from itwin.updates import UpdateStream

LINE_SECONDS = 2.0  # at most one progress line in this time


def watch(job, points=True):
    """See Job.watch()."""
    if in_notebook():
        from itwin import notebook
        return notebook.view(job, points)
    return print_lines(job, points)


def in_notebook():
    """Whether this runs in a Jupyter kernel."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def print_lines(job, points=True, out=None, clock=time.monotonic):
    """Prints state changes at once, progress with the newest values now and then, and the end. Returns the job."""
    out = out or sys.stdout
    newest, said, next_line = {}, None, 0.0

    def say(text):
        print(text, file=out, flush=True)

    stream = UpdateStream(job._connection, job.id, points=points,
                          on_trouble=lambda text: say(f"  {text}" if text else "  the gateway is back"))
    told_progress = None
    try:
        for update in stream:
            job._saw(update.job)
            for point in update.points:
                newest[point.series] = point.value
            headline = (job.state, job.reason, job.site, job.message.attempt)
            if headline != said:
                said = headline
                final = states.is_final(job.message.state)
                say(render.headline(job.message) + (f" · {job.reason}" if job.reason and not final else ""))
            progress = progress_line(job.message, newest)
            if progress and progress != told_progress and clock() >= next_line and not job.finished:
                told_progress, next_line = progress, clock() + LINE_SECONDS
                say("  " + progress)
    except KeyboardInterrupt:
        say(f"  no longer watching; the job goes on: gw.job('{job.id[:8]}').watch()")
        return job
    finally:
        stream.close()
    ending = progress_line(job.message, newest)
    if ending and ending != told_progress:
        say("  " + ending)
    if job.message.summary:
        say("  result: " + render.summary_text(job.message))
    if job.state != "SUCCEEDED" and job.reason:
        say("  " + job.reason)
    return job


def progress_line(message, newest):
    """"epoch 12/40 · step … · train/loss 0.0521 · test/rmse 0.2373", at most six series, monitors left out."""
    parts = [render.progress_text(message)] if render.progress_text(message) else []
    shown = [(name, value) for name, value in sorted(newest.items()) if not render.is_monitor(name)]
    parts += [f"{name} {render.number(value)}" for name, value in shown[:6]]
    return " · ".join(parts)
