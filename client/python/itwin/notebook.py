"""The live view of a job in Jupyter. Imports ipywidgets, so it is imported only when it is needed."""

import atexit
import html
import io
import threading
import time
import weakref

from itwin import plot, render
from itwin.errors import ItwinError, require
from itwin.updates import UpdateStream

ipywidgets = require("ipywidgets", "the live view of job.watch()")

REDRAW_SECONDS = 1.0
MOST_POINTS = 2000   # kept per series for the picture; halved when reached
MOST_SERIES = 64

_live = weakref.WeakSet()


class Curve:
    """A bounded picture of a series: when full, every second point goes and later ones are taken at the coarser pace."""

    def __init__(self):
        self.steps, self.values = [], []
        self._stride, self._skipped = 1, 0
        self._tail = None

    def add(self, step, value):
        self._tail = (step, value)
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped, self._tail = 0, None
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) >= MOST_POINTS:
            del self.steps[::2], self.values[::2]
            self._stride *= 2

    def line(self):
        """Steps and values, the newest point always among them."""
        if self._tail is None:
            return self.steps, self.values
        return self.steps + [self._tail[0]], self.values + [self._tail[1]]


class JobView(ipywidgets.VBox):
    """Follows the job in a thread of its own until it has ended or stop() is called; the kernel stays free.

    `job` is kept fresh meanwhile. wait(timeout) blocks until the view is complete.
    """

    def __init__(self, job, points=True):
        self.job = job
        self._title = ipywidgets.HTML()
        self._bar = ipywidgets.FloatProgress(min=0.0, max=1.0, layout=ipywidgets.Layout(width="60%"))
        self._text = ipywidgets.HTML()
        self._picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(display="none", max_width="100%"))
        super().__init__(children=[self._title, self._bar, self._text, self._picture])
        self._curves, self._newest, self._trouble = {}, {}, ""
        self._drawn_at, self._dirty = 0.0, False
        self._stream = UpdateStream(job._connection, job.id, points=points, on_trouble=self._on_trouble)
        self._done = threading.Event()
        self._show()
        _live.add(self)
        threading.Thread(target=self._follow, name=f"itwin-watch-{job.id[:8]}", daemon=True).start()

    def stop(self):
        """Stops the view; the job goes on."""
        self._stream.close()

    def wait(self, timeout=None):
        """Blocks until the view is complete or was stopped; False after `timeout` seconds."""
        return self._done.wait(timeout)

    def _follow(self):
        try:
            for update in self._stream:
                self.job._saw(update.job)
                for point in update.points:
                    self._take(point)
                self._show()
                if self._dirty and time.monotonic() - self._drawn_at >= REDRAW_SECONDS:
                    self._draw()
        except ItwinError as error:
            self._trouble = str(error)
        finally:
            self._show()
            if self._dirty:
                self._draw()
            self._done.set()

    def _take(self, point):
        self._newest[point.series] = point.value
        if point.series not in self._curves and len(self._curves) >= MOST_SERIES:
            return
        self._curves.setdefault(point.series, Curve()).add(point.step, point.value)
        self._dirty = True

    def _on_trouble(self, text):
        self._trouble = text or ""
        self._show()

    def _show(self):
        from itwin import watch
        message = self.job.message
        self._title.value = render.job_html_head(message)
        part = render.fraction(message)
        self._bar.value = part if part is not None else 0.0
        self._bar.bar_style = {"SUCCEEDED": "success", "FAILED": "danger", "CANCELLED": "warning"}.get(self.job.state, "info")
        lines = [watch.progress_line(message, {} if message.summary else self._newest), render.summary_text(message),
                 "" if self.job.state == "SUCCEEDED" else message.reason, self._trouble]
        self._text.value = "<br>".join(html.escape(line) for line in lines if line)

    def _draw(self):
        self._drawn_at, self._dirty = time.monotonic(), False
        picture = draw(self._curves)
        if picture:
            self._picture.value = picture
            self._picture.layout.display = "block"


def draw(curves):
    """{series: Curve} as PNG bytes; None when there is nothing to see or no matplotlib. Safe in any thread: no pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    groups = plot.panels(sorted(curves))
    if not groups:
        return None
    groups = dict(list(groups.items())[:3])
    figure = Figure(figsize=(4.2 * len(groups), 2.8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, names) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        for name in names:
            plot.draw_line(axis, name, *curves[name].line())
        plot.finish(axis, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@atexit.register
def _stop_all():
    for view in list(_live):
        view.stop()
