"""One job: where it is, what it measures, how it ends."""

import pathlib
import uuid

from itwin import artifacts, render, states
from itwin.errors import JobFailedError, SpecError, StateError, WaitTimeout, require
from itwin.result import Result
from itwin.updates import UpdateStream
from itwin.v1 import jobs_pb2

LOG_PIECE_BYTES = 1 << 20
POINTS_PER_CALL = 50_000
_STREAMS = {"stdout": jobs_pb2.LOG_STREAM_STDOUT, "stderr": jobs_pb2.LOG_STREAM_STDERR}


class Job:
    """Made by a Gateway. The properties show the job as it was last seen; refresh(), wait() and watch() look again."""

    def __init__(self, connection, message):
        self._connection = connection
        self.message = message  # itwin.v1.Job, as last seen

    # ---- as last seen --------------------------------------------------------------------------------------------

    @property
    def id(self):
        return self.message.id

    @property
    def name(self):
        return self.message.name

    @property
    def state(self):
        """"QUEUED", "RUNNING", …, "SUCCEEDED", "FAILED", "CANCELLED"."""
        return states.name(self.message.state)

    @property
    def reason(self):
        """One sentence: why it waits or why it failed, and what to do."""
        return self.message.reason

    @property
    def site(self):
        return self.message.site

    @property
    def finished(self):
        return states.is_final(self.message.state)

    @property
    def created(self):
        return render.moment(self.message.created_us)

    @property
    def summary(self):
        """The final metrics of the result record, such as {"test/rmse": 0.2269}; empty before the end."""
        return dict(self.message.summary)

    def __repr__(self):
        return f"<itwin.Job {self.id[:8]} {self.name!r} {self.state}>"

    def __str__(self):
        return render.headline(self.message)

    def _repr_html_(self):
        return render.job_html(self.message)

    # ---- live ----------------------------------------------------------------------------------------------------

    def refresh(self):
        """Asks the gateway again; returns self."""
        self._saw(self._connection.call("Jobs", "GetJob", jobs_pb2.GetJobRequest(job=self.id), "look at the job"))
        return self

    def stream(self, points=True, logs=False, cursor=None, timeout=None):
        """Yields updates (.job, .events, .points, .stdout, .stderr, .cursor) until the job is final and all is delivered.

        Goes on after a gateway restart from the last cursor: no point is lost or repeated. `cursor`: of an earlier update, to go
        on after it. `timeout`: seconds after which it ends quietly.
        """
        updates = UpdateStream(self._connection, self.id, points=points, logs=logs, cursor=cursor, timeout=timeout)
        try:
            for update in updates:
                self._saw(update.job)
                yield update
        finally:
            updates.close()

    def wait(self, timeout=None):
        """Returns self when the job has ended, however it ended. Raises WaitTimeout after `timeout` seconds."""
        for _ in self.stream(points=False, timeout=timeout):
            if self.finished:
                return self
        if not self.finished:
            raise WaitTimeout(f"job {self.id[:8]} is {self.state} after {render.duration(timeout or 0)}" +
                              (f": {self.reason}" if self.reason else ".") + " It goes on; wait again, or job.cancel().")
        return self

    def watch(self, points=True):
        """In a notebook: shows a live view, leaves the kernel free and returns the view. Elsewhere: prints lines until the job has
        ended (an interrupt stops the watching, not the job) and returns self."""
        from itwin import watch
        return watch.watch(self, points)

    # ---- what it left --------------------------------------------------------------------------------------------

    def metrics(self, series=None, wide=False):
        """All points so far as a DataFrame: series, attempt, step, time, value, in the order they were committed.

        `series`: a name or several; a trailing "*" matches any ending. `wide=True`: one row per step, one column per series (the
        newest value where a step was measured again).
        """
        pandas = require("pandas", "job.metrics()")
        numpy = require("numpy", "job.metrics()")
        columns = {"series": [], "attempt": [], "step": [], "time": [], "value": []}
        for block in self._blocks(_names(series)):
            count = len(block.values)
            columns["series"].append(numpy.full(count, block.series, dtype=object))
            columns["attempt"].append(numpy.full(count, block.attempt, dtype=numpy.int64))
            columns["step"].append(numpy.asarray(block.steps, dtype=numpy.int64))
            columns["time"].append(numpy.asarray(block.times_us, dtype="datetime64[us]"))
            columns["value"].append(numpy.asarray(block.values, dtype=numpy.float64))
        empty = {"series": object, "attempt": numpy.int64, "step": numpy.int64, "time": "datetime64[us]", "value": numpy.float64}
        frame = pandas.DataFrame({name: numpy.concatenate(parts) if parts else numpy.empty(0, empty[name])
                                  for name, parts in columns.items()})
        frame["time"] = pandas.to_datetime(frame["time"], utc=True)
        if wide:
            frame = frame.drop_duplicates(["series", "step"], keep="last").pivot(index="step", columns="series", values="value")
        return frame

    def _blocks(self, series):
        cursor = 0
        while True:
            response = self._connection.call("Jobs", "ListPoints", jobs_pb2.ListPointsRequest(
                job=self.id, cursor=cursor, series=series, limit=POINTS_PER_CALL), "read the metrics")
            yield from response.blocks
            if response.end or response.next_cursor == cursor:
                return
            cursor = response.next_cursor

    def plot(self, series=None, axes=None):
        """Draws the curves, however long, from min, max and last value per bucket; one panel per metric. Returns the axes."""
        from itwin import plot
        response = self._connection.call("Jobs", "QuerySeries", jobs_pb2.QuerySeriesRequest(
            job=self.id, series=_names(series), buckets=plot.BUCKETS), "read the metrics")
        return plot.draw_buckets(response.series, axes, title=f"{self.name} ({self.id[:8]})", everything=series is not None)

    def logs(self, stream="stdout", attempt=0, tail_bytes=None):
        """The mirrored output as text: of the newest attempt, or the one given; `tail_bytes`: only the end."""
        if stream not in _STREAMS:
            raise SpecError(f"stream='{stream}': it is 'stdout' or 'stderr'.")
        pieces, offset, dropped = [], -int(tail_bytes) if tail_bytes else 0, 0
        while True:
            response = self._connection.call("Jobs", "ReadLog", jobs_pb2.ReadLogRequest(
                job=self.id, stream=_STREAMS[stream], attempt=attempt, offset=offset, limit=LOG_PIECE_BYTES), "read the log")
            pieces.append(response.data)
            dropped = response.dropped_bytes
            if not response.data or response.next_offset >= response.size:
                break
            offset, attempt = response.next_offset, response.attempt
        text = b"".join(pieces).decode("utf-8", "replace")
        if dropped:
            text += f"\n[{dropped} more bytes were written, beyond the limit of the mirror]\n"
        return text

    def events(self):
        """Everything that happened to the job, as a DataFrame: sequence, time, attempt, kind, state, message, actor, failure."""
        pandas = require("pandas", "job.events()")
        rows, after = [], 0
        while True:
            response = self._connection.call("Jobs", "ListEvents", jobs_pb2.ListEventsRequest(
                job=self.id, after_sequence=after, limit=1000), "read the events")
            if not response.events:
                break
            rows += [(event.sequence, render.moment(event.time_us), event.attempt, event.kind, states.name(event.state),
                      event.message, event.actor, states.failure(event.failure)) for event in response.events]
            after = response.events[-1].sequence
        return pandas.DataFrame(rows, columns=["sequence", "time", "attempt", "kind", "state", "message", "actor", "failure"])

    def result(self, timeout=None, partial=False):
        """Waits for the end and returns the Result. Raises JobFailedError when the job did not succeed, unless partial=True, which
        gives what there is (checkpoints, logs)."""
        if not self.finished:
            self.wait(timeout)
        if self.state != "SUCCEEDED" and not partial:
            self.refresh()
            kind = states.failure(self.message.failure)
            raise JobFailedError(
                f"job {self.id[:8]} ended {self.state}" + (f" ({kind.lower()})" if kind else "") +
                f": {self.reason or 'no reason was recorded.'} See job.logs('stderr') and job.events(); "
                "job.result(partial=True) has the files it left.", self)
        return Result(self._connection, self)

    # ---- deciding ------------------------------------------------------------------------------------------------

    def cancel(self, reason=""):
        """Asks for the end and returns self at once; the state follows. Cancelling a finished job is a StateError."""
        request = jobs_pb2.CancelJobRequest(job=self.id, reason=reason)
        self._saw(self._connection.call("Jobs", "CancelJob", request, "cancel the job"))
        return self

    def trace(self, steps=20, file=None, progress=None):
        """Has the next `steps` training steps of all ranks of the running job traced, waits, and returns the path of the trace, which is
        for https://ui.perfetto.dev or chrome://tracing. `file`: where to put it (default: <job>-trace-<n>.json here). StateError when
        the job does not run or does not train, or when it ended before."""
        asked = self._connection.call("Jobs", "TraceJob", jobs_pb2.TraceJobRequest(job=self.id, steps=steps), "trace the job")
        self._saw(asked.job)
        said = None
        for update in self.stream(points=False, cursor=jobs_pb2.WatchCursor(event_sequence=asked.job.version)):
            # Whoever was asked is over once another attempt is to be made.
            said = next((event.message for event in update.events if event.kind in ("traced", "requeued")), None)
            if said is not None:
                break
        found = [output for output in Result(self._connection, self).files if output.path == asked.output]
        if not found:
            raise StateError(f"there is no {asked.output} of job {self.id[:8]}: {said or 'it ended before.'}")
        path = pathlib.Path(file or f"{self.id}-{asked.output}")
        return artifacts.download(self._connection, found[0]._replace(path=path.name), path.parent, progress)

    def retry(self, fresh=False):
        """Submits a failed or cancelled job again, from its newest checkpoint unless fresh=True; returns the new Job."""
        request = jobs_pb2.RetryJobRequest(job=self.id, request_id=uuid.uuid4().hex, fresh=fresh)
        return Job(self._connection, self._connection.call("Jobs", "RetryJob", request, "retry the job").job)

    def _saw(self, message):
        # Answers may overtake each other; what is newer stays. GetJob alone carries the spec.
        if message is None or message.version < self.message.version:
            return
        self.message = message


def _names(series):
    if series is None:
        return []
    return [series] if isinstance(series, str) else list(series)
