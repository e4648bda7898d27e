"""Reading a job: tables, logs, plots; cancel and retry."""

import math

import matplotlib
import pytest

from itwin.errors import SpecError, StateError

matplotlib.use("Agg")


@pytest.fixture
def job(fake):
    job = fake.add_job(name="wind")
    fake.move(job, "RUNNING", site="local")
    fake.emit(job, *(("train/loss", i, 1.0 / (i + 1)) for i in range(20)), *(("test/rmse", i, i / 2) for i in range(0, 20, 5)))
    return job


def test_metrics_is_a_long_table_in_committed_order(fake, gw, job):
    frame = gw.job("7f3c").metrics()
    assert list(frame.columns) == ["series", "attempt", "step", "time", "value"]
    assert [(r.series, r.step, r.value) for r in frame.itertuples()] == [(s, step, v) for s, _, step, _, v in job.points]
    assert str(frame.time.dtype) in ("datetime64[ns, UTC]", "datetime64[us, UTC]") and frame.time[1].year == 2023
    assert frame.step.dtype == "int64" and frame.value.dtype == "float64"


def test_metrics_by_name_prefix_and_wide(fake, gw, job):
    handle = gw.job("7f3c")
    assert set(handle.metrics("test/*").series) == {"test/rmse"}
    assert len(handle.metrics(["test/rmse", "train/loss"])) == 24
    fake.emit(job, ("train/loss", 3, 9.0))  # measured again by a second attempt
    wide = handle.metrics(wide=True)
    assert wide.loc[3, "train/loss"] == 9.0 and wide.loc[5, "test/rmse"] == 2.5 and math.isnan(wide.loc[3, "test/rmse"])
    assert wide.index.name == "step" and len(wide) == 20


def test_metrics_of_a_job_without_points(fake, gw):
    fake.add_job("e" * 16)
    handle = gw.job("eeee")
    assert len(handle.metrics()) == 0 and list(handle.metrics().columns)[0] == "series"
    assert handle.metrics(wide=True).empty
    assert len(handle.plot()) == 1


def test_nan_and_infinity_survive(fake, gw, job):
    fake.emit(job, ("x", 0, float("nan")), ("x", 1, float("inf")))
    values = list(gw.job("7f3c").metrics("x").value)
    assert math.isnan(values[0]) and values[1] == float("inf")


def test_plot_has_one_panel_per_metric(fake, gw, job):
    fake.emit(job, ("train/loss_epoch", 19, 0.5), ("node/cpu_percent", 0, 50.0), ("perf/wait_s", 0, 1.0))
    axes = gw.job("7f3c").plot()
    assert [axis.get_title() for axis in axes] == ["loss", "rmse"]
    assert [line.get_label() for line in axes[0].lines] == ["train/loss", "train/loss_epoch"]
    assert [axis.get_title() for axis in gw.job("7f3c").plot(["*"])] == ["loss", "cpu_percent", "rmse", "wait_s"]


def test_events_table_pages_to_the_end(fake, gw, job):
    for _ in range(5):
        fake.move(job, "RUNNING")
    frame = gw.job("7f3c").events()
    assert len(frame) == 6 and frame.sequence.is_monotonic_increasing and set(frame.state) == {"RUNNING"}


def test_logs_are_read_to_the_end_and_say_what_was_dropped(fake, gw, job):
    job.logs[1] = "héllo wörld, all of it\n".encode()
    job.logs[2] = b"bad \xff byte"
    handle = gw.job("7f3c")
    assert handle.logs() == "héllo wörld, all of it\n"
    assert handle.logs("stderr") == "bad � byte"
    assert handle.logs(tail_bytes=6) == "of it\n"
    job.dropped = 10
    assert "10 more bytes" in handle.logs()
    with pytest.raises(SpecError, match="'stdout' or 'stderr'"):
        handle.logs("stdin")


def test_cancel_and_retry(fake, gw, job):
    handle = gw.job("7f3c")
    assert handle.cancel("enough") is handle and handle.state == "CANCELLED" and handle.reason == "enough"
    with pytest.raises(StateError, match="nothing to cancel"):
        handle.cancel()
    again = handle.retry()
    assert again.id != handle.id and again.message.retry_of == handle.id


def test_jobs_pages_filters_and_shows_a_table(fake, gw):
    for i in range(10):
        job = fake.add_job(f"{i:016x}", name=f"<run {i}>")
        if i % 2:
            fake.move(job, "SUCCEEDED")
    jobs = gw.jobs()
    assert [job.id for job in jobs] == [f"{i:016x}" for i in reversed(range(10))]
    assert len(gw.jobs(limit=4)) == 4
    assert {job.state for job in gw.jobs("succeeded")} == {"SUCCEEDED"} and len(gw.jobs(["SUCCEEDED", "QUEUED"])) == 10
    assert [job.name for job in gw.jobs(name="run 7")] == ["<run 7>"]
    html = jobs._repr_html_()
    assert "&lt;run 3&gt;" in html and "<run 3>" not in html
    assert list(jobs.to_frame().name)[0] == "<run 9>" and "SUCCEEDED" in repr(jobs)
    with pytest.raises(SpecError, match="not a state.*SUCCEEDED"):
        gw.jobs("done")


def test_job_card_is_escaped(fake, gw, job):
    fake.move(job, "FAILED", "<script>alert(1)</script>")
    html = gw.job("7f3c")._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;" in html and "FAILED" in html


def test_an_older_answer_does_not_overwrite_a_newer_one(fake, gw, job):
    handle = gw.job("7f3c")
    old = type(handle.message)()
    old.CopyFrom(handle.message)
    fake.move(job, "SUCCEEDED")
    handle.refresh()
    handle._saw(old)
    assert handle.state == "SUCCEEDED"
