"""The live view of a job in Jupyter: progress, newest values and curves, fed by threads of its own.

Two faces of one view: widgets where ipywidgets is 7 or newer, else a display that is replaced in place, which every Jupyter front end
(and nbconvert) understands.
"""

import atexit
import base64
import html
import io
import threading
import weakref

from itwin import plot, render
from itwin.errors import ItwinError
from itwin.updates import UpdateStream

REDRAW_SECONDS = 1.0  # between two pictures
MOST_POINTS = 2000    # kept per series for the picture; halved when reached
MOST_SERIES = 64
MOST_DISPLAYS = 4     # cells that show one view at once

_live = weakref.WeakSet()


class Curve:
    """A bounded picture of a series: when full, every second point goes and later ones are taken at the coarser pace."""

    def __init__(self):
        self._steps, self._values = [], []
        self._stride, self._skipped = 1, 0
        self._tail = None

    def add(self, step, value):
        self._tail = (step, value)
        self._skipped += 1
        if self._skipped < self._stride:
            return
        self._skipped, self._tail = 0, None
        self._steps.append(step)
        self._values.append(value)
        if len(self._steps) >= MOST_POINTS:
            del self._steps[::2], self._values[::2]
            self._stride *= 2

    def line(self):
        """Copies of steps and values, the newest point always among them."""
        tail = [self._tail] if self._tail is not None else []
        return self._steps + [step for step, _ in tail], self._values + [value for _, value in tail]


class LiveView:
    """Follows the job until it has ended or stop() is called; the kernel stays free. `job` is kept fresh meanwhile."""

    def __init__(self, job, points=True):
        self.job = job
        self._lock = threading.Lock()  # guards what the follower writes and the painter reads
        self._curves, self._newest, self._trouble = {}, {}, ""
        self._picture, self._picture_of = None, 0
        self._points = 0
        self._changed, self._ended, self._done = threading.Event(), threading.Event(), threading.Event()
        self._stream = UpdateStream(job._connection, job.id, points=points, on_trouble=self._on_trouble)
        self._greeted = False

    def start(self):
        """Shows the view in the current cell and begins to follow."""
        self._greeted = True
        self.show()
        self._paint()
        _live.add(self)
        threading.Thread(target=self._follow, name=f"itwin-watch-{self.job.id[:8]}", daemon=True).start()
        threading.Thread(target=self._keep_painting, name=f"itwin-paint-{self.job.id[:8]}", daemon=True).start()
        return self

    def stop(self):
        """Stops the view; the job goes on."""
        self._stream.close()

    def wait(self, timeout=None):
        """Blocks until the view is complete or was stopped; False after `timeout` seconds."""
        return self._done.wait(timeout)

    def __repr__(self):
        return f"<live view of job {self.job.id[:8]}>"

    def _ipython_display_(self):
        if self._greeted:  # watch() as the last line of its cell: it is shown already
            self._greeted = False
        else:
            self.show()

    # ---- faces implement these ---------------------------------------------------------------------------------------

    def show(self):
        raise NotImplementedError

    def paint(self, message, lines, picture):
        """Shows an itwin.v1.Job, lines of text, and a PNG or None."""
        raise NotImplementedError

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _follow(self):
        try:
            for update in self._stream:
                self.job._saw(update.job)
                with self._lock:
                    for point in update.points:
                        self._take(point)
                self._changed.set()
        except ItwinError as error:
            self._on_trouble(str(error))
        finally:
            self._ended.set()
            self._changed.set()

    def _keep_painting(self):
        while not self._ended.is_set():
            self._changed.wait()
            self._changed.clear()
            self._paint()
            self._ended.wait(REDRAW_SECONDS)
        self._paint()
        self._done.set()

    def _take(self, point):
        self._newest[point.series] = point.value
        if point.series in self._curves or len(self._curves) < MOST_SERIES:
            self._curves.setdefault(point.series, Curve()).add(point.step, point.value)
            self._points += 1

    def _on_trouble(self, text):
        with self._lock:
            self._trouble = text or ""
        self._changed.set()

    def _paint(self):
        from itwin import watch
        message = self.job.message
        with self._lock:
            newest, trouble, points = dict(self._newest), self._trouble, self._points
            lines = {name: curve.line() for name, curve in self._curves.items()} if points != self._picture_of else None
        if lines is not None:
            self._picture, self._picture_of = draw(lines), points
        text = [watch.progress_line(message, {} if message.summary else newest), render.summary_text(message),
                "" if self.job.state == "SUCCEEDED" else message.reason, trouble]
        self.paint(message, [line for line in text if line], self._picture)


class DisplayView(LiveView):
    """One display, replaced in place."""

    def __init__(self, job, points=True):
        super().__init__(job, points)
        self._handles = []
        self._html = render.job_html(job.message)

    def show(self):
        from IPython.display import HTML, display
        self._handles = self._handles[-MOST_DISPLAYS + 1:] + [display(HTML(self._html), display_id=True)]

    def paint(self, message, lines, picture):
        from IPython.display import HTML
        part = render.fraction(message)
        bar = "" if part is None else (
            '<div style="width:60%;background:#e0e0e0;border-radius:4px;margin:4px 0">'
            f'<div style="width:{part:.1%};height:10px;border-radius:4px;background:{render.color(message)}"></div></div>')
        image = "" if picture is None else (
            f'<img style="max-width:100%" src="data:image/png;base64,{base64.b64encode(picture).decode()}">')
        text = "<br>".join(html.escape(line) for line in lines)
        self._html = f"<div>{render.job_html_head(message)}{bar}<div>{text}</div>{image}</div>"
        for handle in self._handles:
            handle.update(HTML(self._html))


class WidgetView(LiveView):
    """ipywidgets; `widget` can also be put into a layout of one's own."""

    def __init__(self, job, points=True):
        super().__init__(job, points)
        import ipywidgets
        self._title, self._text = ipywidgets.HTML(), ipywidgets.HTML()
        self._bar = ipywidgets.FloatProgress(min=0.0, max=1.0, layout=ipywidgets.Layout(width="60%"))
        self._image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(display="none", max_width="100%"))
        self.widget = ipywidgets.VBox(children=[self._title, self._bar, self._text, self._image])

    def show(self):
        from IPython.display import display
        display(self.widget)

    def paint(self, message, lines, picture):
        self._title.value = render.job_html_head(message)
        part = render.fraction(message)
        self._bar.value = 0.0 if part is None else part
        self._bar.bar_style = {"SUCCEEDED": "success", "FAILED": "danger", "CANCELLED": "warning"}.get(self.job.state, "info")
        self._text.value = "<br>".join(html.escape(line) for line in lines)
        if picture is not None:
            self._image.value = picture
            self._image.layout.display = "block"


def view(job, points=True):
    """The view with the face that this kernel can show, started."""
    return (WidgetView if _has_widgets() else DisplayView)(job, points).start()


def _has_widgets():
    """ipywidgets before 7 speaks a protocol that newer front ends and nbconvert do not understand."""
    try:
        import ipywidgets
        return int(ipywidgets.__version__.split(".")[0]) >= 7
    except (ImportError, AttributeError, ValueError):
        return False


def draw(lines):
    """{series: (steps, values)} as PNG bytes; None when there is nothing to see or no matplotlib. Safe in any thread: no pyplot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    groups = dict(list(plot.panels(lines).items())[:3])
    if not groups:
        return None
    figure = Figure(figsize=(4.2 * len(groups), 2.8), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, names) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        for name in names:
            plot.draw_line(axis, name, *lines[name])
        plot.finish(axis, title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


@atexit.register
def _stop_all():
    for live in list(_live):
        live.stop()
