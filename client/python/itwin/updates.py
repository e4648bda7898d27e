"""The live stream of one job, in one piece although gateways restart and networks break.

The gateway gives every update a cursor; a broken stream is opened again from the last cursor received, so that no event, point
or byte is repeated or skipped.
"""

import threading
import time
import typing

import grpc

from itwin import states
from itwin.connection import Backoff, is_transient
from itwin.v1 import jobs_pb2

SLICE_SECONDS = 60.0      # a stream is opened anew at least this often: finds connections that died in silence
PATIENCE_SECONDS = 600.0  # how long a gateway may be away before a watch gives up


class Point(typing.NamedTuple):
    """One metric value; `time` is seconds since 1970."""
    series: str
    attempt: int
    step: int
    time: float
    value: float


class Update(typing.NamedTuple):
    """What happened since the update before: any part may be empty."""
    job: object      # itwin.v1.Job message, or None when nothing in it changed
    events: list     # itwin.v1.JobEvent messages
    points: list     # Point
    stdout: bytes
    stderr: bytes
    cursor: object   # pass to Job.stream(cursor=…) to go on from here


class UpdateStream:
    """Iterate once, in one thread; close() from any thread ends the iteration."""

    def __init__(self, connection, job_id, points=True, logs=False, cursor=None, timeout=None,
                 patience=PATIENCE_SECONDS, on_trouble=None):
        """`timeout` seconds end the iteration quietly; `on_trouble(text or None)` is told when the gateway goes and comes."""
        self._connection = connection
        self._job_id = job_id
        self._points = points
        self._logs = logs
        self._cursor = jobs_pb2.WatchCursor()
        if cursor is not None:
            self._cursor.CopyFrom(cursor)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._patience = patience
        self._on_trouble = on_trouble or (lambda text: None)
        self._closed = threading.Event()
        self._call = None
        self.final = False  # whether the end was reached: the job is final and everything has been delivered

    def close(self):
        self._closed.set()
        call = self._call
        if call is not None:
            call.cancel()

    def __iter__(self):
        final, backoff, trouble_since = False, Backoff(), None
        while not self._closed.is_set() and not self._expired():
            request = jobs_pb2.WatchJobRequest(
                job=self._job_id, cursor=self._cursor, points=self._points, logs=self._logs)
            self._call = call = self._connection.stream("Jobs", "WatchJob", request, timeout=self._slice())
            error = None
            try:
                if self._closed.is_set():
                    return
                for message in call:
                    if trouble_since is not None:
                        trouble_since = None
                        self._on_trouble(None)
                    backoff.reset()
                    if message.HasField("cursor"):
                        self._cursor.CopyFrom(message.cursor)
                    if message.HasField("job"):
                        final = states.is_final(message.job.state)
                    yield _update(message)
                if final:
                    self.final = True
                    return
                # It ended although the job is not final: the gateway is stopping.
            except grpc.RpcError as rpc_error:
                error = rpc_error
            finally:
                call.cancel()
            if self._closed.is_set() or self._expired():
                return
            if error is not None:
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    # The slice is over. A unary call tells a quiet job from a dead connection.
                    self._connection.call("Jobs", "GetJob", jobs_pb2.GetJobRequest(job=self._job_id), "watch the job",
                                          patience=self._patience)
                    continue
                if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED and not is_transient(error):
                    raise self._connection.error(error, "watch the job") from None
            now = time.monotonic()
            if trouble_since is None:
                trouble_since = now
            elif error is not None and now - trouble_since > self._patience:
                raise self._connection.error(error, "watch the job") from None
            if error is not None:
                self._on_trouble(f"the gateway at {self._connection.endpoint} is away; trying again")
            if self._closed.wait(backoff.next()):
                return

    def _expired(self):
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _slice(self):
        if self._deadline is None:
            return SLICE_SECONDS
        return max(0.05, min(SLICE_SECONDS, self._deadline - time.monotonic()))


def _update(message):
    return Update(
        job=message.job if message.HasField("job") else None,
        events=list(message.events),
        points=[Point(block.series, block.attempt, step, time_us / 1e6, value)
                for block in message.blocks
                for step, time_us, value in zip(block.steps, block.times_us, block.values)],
        stdout=message.stdout_data,
        stderr=message.stderr_data,
        cursor=message.cursor if message.HasField("cursor") else None)
