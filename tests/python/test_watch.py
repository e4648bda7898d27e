"""Watching: every point exactly once, whatever happens to the gateway."""

import io
import threading

import grpc
import pytest

from itwin import notebook, updates, watch
from itwin.errors import JobFailedError, NotFoundError, UnavailableError, WaitTimeout
from conftest import wait_until


class RecordingView(notebook.DisplayView):
    """Shows nothing; what it would show is in _html."""

    def show(self):
        pass


def expected(job):
    return [(series, step, value) for series, _, step, _, value in job.points]


def triples(points):
    return [(point.series, point.step, point.value) for point in points]


class Watcher(threading.Thread):
    """Collects a stream in the background."""

    def __init__(self, job, **options):
        super().__init__(daemon=True)
        self.points, self.events, self.error, self.cursor = [], [], None, None
        self._job, self._options = job, options
        self.start()

    def run(self):
        try:
            for update in self._job.stream(**self._options):
                self.points += update.points
                self.events += update.events
                self.cursor = update.cursor or self.cursor
        except Exception as error:
            self.error = error

    def finish(self):
        self.join(30)
        assert not self.is_alive() and self.error is None, self.error


def test_points_and_events_once_through_restarts_on_the_same_port(fake, gw):
    job = fake.add_job()
    fake.move(job, "RUNNING")
    watcher = Watcher(gw.job(job.message.id))
    for restart in range(3):
        fake.emit(job, *(("train/loss", 100 * restart + i, 1.0 / (i + 1)) for i in range(40)))
        wait_until(lambda: len(watcher.points) > 40 * restart + 5, what="points before the restart")
        fake.stop()
        fake.emit(job, *(("test/rmse", 100 * restart + i, i / 7) for i in range(10)))  # committed while nobody can see
        fake.start()
    fake.move(job, "SUCCEEDED")
    watcher.finish()
    assert triples(watcher.points) == expected(job) and len(watcher.points) == 150
    assert [event.sequence for event in watcher.events] == [event.sequence for event in job.events]


def test_a_break_after_every_message_loses_nothing(fake, gw):
    job = fake.add_job()
    fake.move(job, "RUNNING")
    fake.emit(job, *(("a", i, float(i)) for i in range(30)))
    fake.move(job, "SUCCEEDED")
    for after in range(1, 6):
        fake.cut_watch_after = [after] * 8
        watcher = Watcher(gw.job(job.message.id))
        watcher.finish()
        assert triples(watcher.points) == expected(job)


def test_short_slices_lose_nothing(fake, gw, monkeypatch):
    monkeypatch.setattr(updates, "SLICE_SECONDS", 0.1)
    job = fake.add_job()
    watcher = Watcher(gw.job(job.message.id))
    for step in range(5):
        fake.emit(job, ("a", step, 0.5))
        count = [method for method, _ in fake.calls].count("WatchJob")
        wait_until(lambda: [method for method, _ in fake.calls].count("WatchJob") > count, what="the next slice")
    # Between slices a unary call, which has its own deadline, tells a quiet job from a dead connection.
    assert [method for method, _ in fake.calls].count("GetJob") >= 5
    fake.move(job, "SUCCEEDED")
    watcher.finish()
    assert triples(watcher.points) == expected(job)


def test_stream_goes_on_from_a_given_cursor(fake, gw):
    job = fake.add_job()
    fake.emit(job, *(("a", i, float(i)) for i in range(9)))
    handle = gw.job(job.message.id)
    stream = handle.stream()
    first = next(stream)
    stream.close()
    fake.move(job, "SUCCEEDED")
    rest = [point for update in handle.stream(cursor=first.cursor) for point in update.points]
    assert triples(first.points + rest) == expected(job) and first.points and rest


def test_a_job_that_vanishes_ends_the_stream(fake, gw):
    job = fake.add_job()
    handle = gw.job(job.message.id)
    fake.jobs.clear()
    with pytest.raises(NotFoundError):
        list(handle.stream())


def test_gives_up_after_its_patience(fake, gw):
    job = fake.add_job()
    handle = gw.job(job.message.id)
    fake.stop()
    with pytest.raises(UnavailableError, match="submitted jobs go on meanwhile"):
        list(updates.UpdateStream(gw._connection, handle.id, patience=0.2))


def test_wait_returns_whatever_the_end(fake, gw):
    job = fake.add_job()
    handle = gw.job(job.message.id)
    with pytest.raises(WaitTimeout, match="is QUEUED after 0s"):
        handle.wait(timeout=0.2)
    assert isinstance(WaitTimeout("x"), TimeoutError)
    fake.move(job, "FAILED", "rank 1 was killed", failure=2)
    assert handle.wait(timeout=30).state == "FAILED"
    with pytest.raises(JobFailedError, match=r"FAILED \(app\): rank 1 was killed.*partial=True"):
        handle.result()
    assert handle.result(partial=True).files == []


def test_text_watch_prints_states_progress_and_the_end(fake, gw):
    job = fake.add_job(name="wind")
    fake.move(job, "RUNNING", site="local", progress={"step": 5, "steps": 10, "epoch": 1, "epochs": 2})
    fake.emit(job, ("train/loss", 5, 0.25), ("node/cpu_percent", 0, 99.0))
    out, thread = io.StringIO(), None
    handle = gw.job(job.message.id)
    thread = threading.Thread(target=lambda: watch.print_lines(handle, out=out), daemon=True)
    thread.start()
    wait_until(lambda: "RUNNING" in out.getvalue(), what="the state")
    fake.move(job, "SUCCEEDED", summary={"test/rmse": 0.2269})
    thread.join(30)
    text = out.getvalue()
    assert "job 7f3c0a1b wind: RUNNING on local (2 ranks)" in text
    assert "epoch 1/2 · step 5/10" in text and "train/loss 0.25" in text and "node/" not in text
    assert "result: test/rmse 0.2269" in text


def test_text_watch_shows_why_it_failed_and_outages(fake, gw):
    job = fake.add_job()
    out = io.StringIO()
    handle = gw.job(job.message.id)
    thread = threading.Thread(target=lambda: watch.print_lines(handle, out=out), daemon=True)
    thread.start()
    wait_until(lambda: "QUEUED" in out.getvalue(), what="the state")
    fake.stop()
    wait_until(lambda: "is away" in out.getvalue(), what="the outage")
    fake.start()
    wait_until(lambda: "is back" in out.getvalue(), what="the return")
    fake.move(job, "FAILED", "loss is NaN at step 37 on rank 1; lower the learning rate")
    thread.join(30)
    assert "lower the learning rate" in out.getvalue()


def test_outside_a_notebook_watch_is_text(fake, gw, capsys):
    job = fake.add_job()
    fake.move(job, "SUCCEEDED")
    handle = gw.job(job.message.id)
    assert handle.watch() is handle
    assert "SUCCEEDED" in capsys.readouterr().out


@pytest.mark.parametrize("face", [notebook.WidgetView, RecordingView])
def test_notebook_view_follows_in_the_background(fake, gw, face, monkeypatch):
    monkeypatch.setattr(notebook, "REDRAW_SECONDS", 0.01)
    job = fake.add_job(name="<b>wind</b>")
    fake.move(job, "RUNNING", progress={"step": 5, "steps": 10})
    fake.emit(job, *(("train/loss", i, 1.0 / (i + 1)) for i in range(20)))
    view = face(gw.job(job.message.id))
    monkeypatch.setattr(view, "show", lambda: None)
    view.start()  # returns at once: the kernel stays free

    def looks():
        if face is RecordingView:
            return view._html
        return view._title.value + view._text.value
    wait_until(lambda: "step 5/10" in looks() and "train/loss 0.05" in looks() and view._picture, what="progress and curve")
    fake.stop()
    wait_until(lambda: "is away" in looks(), what="the outage")
    fake.start()
    wait_until(lambda: "is away" not in looks(), what="the return")
    fake.move(job, "SUCCEEDED", summary={"test/rmse": 0.25})
    assert view.wait(30) and view.job.state == "SUCCEEDED"
    assert "SUCCEEDED" in looks() and "&lt;b&gt;wind" in looks() and "<b>wind" not in looks() and "test/rmse 0.25" in looks()
    if face is RecordingView:
        assert "data:image/png;base64,iVBOR" in looks() and "width:100.0%" in looks()
    else:
        assert view._bar.value == 1.0 and view._bar.bar_style == "success" and bytes(view._image.value).startswith(b"\x89PNG")


def test_notebook_view_can_be_stopped_and_tells_a_final_error(fake, gw, monkeypatch):
    view = RecordingView(gw.job(fake.add_job().message.id))
    view.start()
    view.stop()
    assert view.wait(30)
    lost = RecordingView(gw.job("7f3c"))
    fake.jobs.clear()
    lost.start()
    assert lost.wait(30) and "no job" in lost._html


def test_curve_is_bounded_and_keeps_the_newest_point():
    curve = notebook.Curve()
    for step in range(100_001):
        curve.add(step, float(step))
    steps, values = curve.line()
    assert len(steps) <= notebook.MOST_POINTS + 1 and steps[-1] == 100_000 and steps == sorted(steps) and steps[0] < 2000
    assert values[-1] == 100_000.0
