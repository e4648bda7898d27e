"""A gateway in this process that keeps state: real gRPC over TLS, tokens, cursors, chunked artifacts. A test scripts what
happens to its jobs, takes it away and brings it back on the same port."""

import concurrent.futures
import hashlib
import json
import subprocess
import threading

import grpc
from google.protobuf import json_format

from itwin.v1 import (artifacts_pb2, artifacts_pb2_grpc, jobs_pb2, jobs_pb2_grpc, sites_pb2, sites_pb2_grpc, spec_pb2)

TOKEN = "itwin-test-token"


def make_certificates(directory):
    """A CA and a server certificate for 127.0.0.1 and localhost, as PEM files in `directory`."""
    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=directory)

    openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "ca.key",
            "-out", "ca.pem", "-subj", "/CN=test CA", "-days", "2")
    openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", "server.key",
            "-out", "server.csr", "-subj", "/CN=localhost")
    (directory / "san.cnf").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    openssl("x509", "-req", "-in", "server.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
            "-out", "server.pem", "-extfile", "san.cnf", "-days", "2")
    return directory


class FakeJob:
    """What the gateway would have in its database about one job."""

    def __init__(self, job_id, spec):
        self.message = jobs_pb2.Job(id=job_id, name=spec.name, state=jobs_pb2.JOB_STATE_QUEUED, spec=spec, version=1,
                                    created_us=1_700_000_000_000_000, ranks=2, owner="tester")
        self.events, self.points, self.outputs = [], [], []
        self.logs = {jobs_pb2.LOG_STREAM_STDOUT: b"", jobs_pb2.LOG_STREAM_STDERR: b""}
        self.dropped = 0


class FakeGateway:
    """start(), stop() and start() again keep port and state. All that a test reads or writes is guarded by `changed`."""

    def __init__(self, certificates):
        self._certificates = certificates
        self.port = 0
        self._server = None
        self.changed = threading.Condition()
        self.jobs, self.requests, self.blobs, self.partial = {}, {}, {}, {}
        self.calls = []                 # (method, request) in order
        self.fail_next = {}             # method -> [status codes], consumed one per call
        self.cut_uploads_after = None   # bytes after which the next upload breaks off
        self.cut_downloads_after = None
        self.corrupt_downloads = 0      # so many downloads deliver a flipped byte
        self.cut_watch_after = []       # messages after which each next watch breaks off
        self.api = 1

    def start(self):
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(16))
        jobs_pb2_grpc.add_JobsServicer_to_server(_Jobs(self), self._server)
        artifacts_pb2_grpc.add_ArtifactsServicer_to_server(_Artifacts(self), self._server)
        sites_pb2_grpc.add_SitesServicer_to_server(_Sites(self), self._server)
        credentials = grpc.ssl_server_credentials([((self._certificates / "server.key").read_bytes(),
                                                    (self._certificates / "server.pem").read_bytes())])
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", credentials)
        self._server.start()
        return self

    def stop(self):
        server, self._server = self._server, None
        if server is not None:
            with self.changed:
                self.changed.notify_all()
            server.stop(None).wait()

    @property
    def endpoint(self):
        return f"127.0.0.1:{self.port}"

    # ---- scripting -----------------------------------------------------------------------------------------------

    def add_job(self, job_id="7f3c0a1b2c3d4e5f", name="test", spec=None):
        with self.changed:
            spec = spec or spec_pb2.JobSpec(name=name)
            self.jobs[job_id] = FakeJob(job_id, spec)
            self.changed.notify_all()
            return self.jobs[job_id]

    def move(self, job, state, reason="", **fields):
        """A state change with its event."""
        with self.changed:
            job.message.state = jobs_pb2.JobState.Value(f"JOB_STATE_{state}")
            job.message.reason = reason
            for name, value in fields.items():
                if name == "summary":
                    job.message.summary.update(value)
                elif name == "progress":
                    job.message.progress.CopyFrom(jobs_pb2.Progress(**value))
                else:
                    setattr(job.message, name, value)
            job.message.version += 1
            job.events.append(jobs_pb2.JobEvent(sequence=job.message.version, time_us=1_700_000_000_000_000, kind=state.lower(),
                                                state=job.message.state, message=reason, actor="gateway"))
            self.changed.notify_all()

    def emit(self, job, *points):
        """(series, step, value) triples."""
        with self.changed:
            for series, step, value in points:
                job.points.append((series, 1, step, 1_700_000_000_000_000 + step, value))
            self.changed.notify_all()

    def put_output(self, job, path, content):
        with self.changed:
            sha256 = hashlib.sha256(content).hexdigest()
            self.blobs[sha256] = content
            job.outputs.append(jobs_pb2.OutputFile(path=path, sha256=sha256, size_bytes=len(content)))

    # ---- for the servicers ---------------------------------------------------------------------------------------

    def enter(self, method, request, context):
        """Token, record of the call, scripted failures."""
        metadata = dict(context.invocation_metadata())
        if metadata.get("authorization") != f"Bearer {TOKEN}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this token is unknown or was revoked")
        with self.changed:
            self.calls.append((method, request))
            codes = self.fail_next.get(method)
            code = codes.pop(0) if codes else None
        if code is not None:
            context.abort(code, f"scripted {code.name}")

    def find(self, prefix, context):
        found = [job for job_id, job in self.jobs.items() if job_id.startswith(prefix)]
        if not found:
            context.abort(grpc.StatusCode.NOT_FOUND, f"no job '{prefix}'; `itwin jobs` lists them")
        if len(found) > 1:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"'{prefix}' fits {len(found)} jobs; give more digits")
        return found[0]


def named_files(message, path=""):
    """[(field path, value)] of all set fields with the option is_file."""
    found = []
    for field, value in message.ListFields():
        here = f"{path}.{field.name}" if path else field.name
        repeated = field.label == field.LABEL_REPEATED
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            continue
        if field.GetOptions().Extensions[spec_pb2.is_file]:
            found += [(f"{here}[{i}]", v) for i, v in enumerate(value)] if repeated else [(here, value)]
        elif field.message_type is not None and field.message_type.full_name.startswith("itwin."):
            for i, inner in enumerate(value if repeated else [value]):
                found += named_files(inner, f"{here}[{i}]" if repeated else here)
    return found


class _Jobs(jobs_pb2_grpc.JobsServicer):

    def __init__(self, gateway):
        self._gateway = gateway

    def ValidateJob(self, request, context):
        self._gateway.enter("ValidateJob", request, context)
        if request.HasField("spec"):
            spec = request.spec
        else:
            try:
                document = json.loads(request.document)
                for override in request.overrides:
                    key, _, value = override.partition("=")
                    at = document
                    *parents, last = key.split(".")
                    for part in parents:
                        at = at.setdefault(part, {})
                    at[last] = json.loads(value)
                spec = json_format.ParseDict(document, spec_pb2.JobSpec())
            except (ValueError, json_format.ParseError) as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{error}")
        return jobs_pb2.ValidateJobResponse(
            spec=spec, files=[jobs_pb2.FileReference(field=field, value=value) for field, value in named_files(spec)])

    def SubmitJob(self, request, context):
        gateway = self._gateway
        with gateway.changed:
            known = gateway.requests.get(request.request_id)
            if known is None:
                job_id = hashlib.sha256(request.request_id.encode()).hexdigest()[:16]
                gateway.requests[request.request_id] = job_id
                gateway.jobs[job_id] = FakeJob(job_id, request.spec)
        # A scripted failure comes after the commit: the reply is lost, the job is not.
        gateway.enter("SubmitJob", request, context)
        return jobs_pb2.SubmitJobResponse(job=gateway.jobs[gateway.requests[request.request_id]].message,
                                          existed=known is not None)

    def GetJob(self, request, context):
        self._gateway.enter("GetJob", request, context)
        return self._gateway.find(request.job, context).message

    def ListJobs(self, request, context):
        self._gateway.enter("ListJobs", request, context)
        fitting = [job.message for job in reversed(self._gateway.jobs.values())
                   if (not request.states or job.message.state in request.states)
                   and request.name_contains in job.message.name]
        first = int(request.page_token or 0)
        last = first + min(request.page_size or 50, 3)  # small pages, so that paging is exercised
        return jobs_pb2.ListJobsResponse(jobs=fitting[first:last], next_page_token=str(last) if last < len(fitting) else "")

    def CancelJob(self, request, context):
        self._gateway.enter("CancelJob", request, context)
        job = self._gateway.find(request.job, context)
        if job.message.state >= jobs_pb2.JOB_STATE_SUCCEEDED:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the job has ended already; nothing to cancel")
        self._gateway.move(job, "CANCELLED", request.reason)
        return job.message

    def RetryJob(self, request, context):
        self._gateway.enter("RetryJob", request, context)
        job = self._gateway.find(request.job, context)
        again = self._gateway.add_job("a" * 16, spec=job.message.spec)
        again.message.retry_of = job.message.id
        return jobs_pb2.SubmitJobResponse(job=again.message)

    def ListEvents(self, request, context):
        self._gateway.enter("ListEvents", request, context)
        job = self._gateway.find(request.job, context)
        return jobs_pb2.ListEventsResponse(
            events=[event for event in job.events if event.sequence > request.after_sequence][:2])

    def ListPoints(self, request, context):
        self._gateway.enter("ListPoints", request, context)
        job = self._gateway.find(request.job, context)
        last = min(len(job.points), request.cursor + 7)
        part = [point for point in job.points[request.cursor:last] if not request.series or any(
            point[0] == name or (name.endswith("*") and point[0].startswith(name[:-1])) for name in request.series)]
        return jobs_pb2.ListPointsResponse(blocks=_blocks(part), next_cursor=last, end=last == len(job.points))

    def QuerySeries(self, request, context):
        self._gateway.enter("QuerySeries", request, context)
        job = self._gateway.find(request.job, context)
        series = {}
        for name, _, step, _, value in job.points:
            bucket = series.setdefault(name, jobs_pb2.SeriesBuckets(series=name))
            bucket.first_step.append(step)
            bucket.last_step.append(step)
            bucket.min.append(value - 0.1)
            bucket.max.append(value + 0.1)
            bucket.last.append(value)
            bucket.points += 1
        return jobs_pb2.QuerySeriesResponse(series=series.values())

    def ReadLog(self, request, context):
        self._gateway.enter("ReadLog", request, context)
        job = self._gateway.find(request.job, context)
        log = job.logs[request.stream or jobs_pb2.LOG_STREAM_STDOUT]
        offset = max(0, len(log) + request.offset) if request.offset < 0 else request.offset
        data = log[offset:offset + 5]
        return jobs_pb2.ReadLogResponse(data=data, offset=offset, next_offset=offset + len(data), size=len(log), attempt=1,
                                        dropped_bytes=job.dropped)

    def ListOutputs(self, request, context):
        self._gateway.enter("ListOutputs", request, context)
        return jobs_pb2.ListOutputsResponse(outputs=self._gateway.find(request.job, context).outputs)

    def WatchJob(self, request, context):
        gateway = self._gateway
        gateway.enter("WatchJob", request, context)
        job = gateway.find(request.job, context)
        cursor = jobs_pb2.WatchCursor()
        cursor.CopyFrom(request.cursor)
        with gateway.changed:
            cut = gateway.cut_watch_after.pop(0) if gateway.cut_watch_after else None
        version, sent = None, 0
        while context.is_active() and gateway._server is not None:
            with gateway.changed:
                update = jobs_pb2.JobUpdate()
                if version != job.message.version:
                    version = job.message.version
                    update.job.CopyFrom(job.message)
                events = [event for event in job.events if event.sequence > cursor.event_sequence][:2]
                if events:
                    update.events.extend(events)
                    cursor.event_sequence = events[-1].sequence
                if request.points and cursor.points < len(job.points):
                    part = job.points[cursor.points:cursor.points + 3]
                    update.blocks.extend(_blocks(part))
                    cursor.points += len(part)
                final = job.message.state >= jobs_pb2.JOB_STATE_SUCCEEDED
                if not update.ListFields():
                    if final:
                        return
                    gateway.changed.wait(0.2)
                    continue
                update.cursor.CopyFrom(cursor)
            yield update
            sent += 1
            if cut is not None and sent >= cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "scripted break")


def _blocks(points):
    return [jobs_pb2.PointBlock(series=series, attempt=attempt, steps=[step], times_us=[time_us], values=[value])
            for series, attempt, step, time_us, value in points]


class _Artifacts(artifacts_pb2_grpc.ArtifactsServicer):

    def __init__(self, gateway):
        self._gateway = gateway

    def StatArtifacts(self, request, context):
        gateway = self._gateway
        gateway.enter("StatArtifacts", request, context)
        return artifacts_pb2.StatArtifactsResponse(artifacts=[artifacts_pb2.ArtifactStatus(
            sha256=sha256, complete=sha256 in gateway.blobs, size_bytes=len(gateway.blobs.get(sha256, b"")),
            received_bytes=len(gateway.partial.get(sha256, b""))) for sha256 in request.sha256])

    def UploadArtifact(self, requests, context):
        gateway = self._gateway
        first = next(requests)
        gateway.enter("UploadArtifact", first, context)
        content = bytearray(gateway.partial.get(first.sha256, b""))
        if first.offset != len(content):
            context.abort(grpc.StatusCode.ABORTED, f"go on from {len(content)}")
        for request in [first, *([] if first.size_bytes == len(first.data) else requests)]:
            if len(request.data) > 1 << 20:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "a chunk has at most 1 MiB")
            content += request.data
            cut = gateway.cut_uploads_after
            if cut is not None and len(content) >= cut:
                gateway.cut_uploads_after = None
                gateway.partial[first.sha256] = bytes(content[:cut])
                context.abort(grpc.StatusCode.UNAVAILABLE, "scripted break")
        if len(content) != first.size_bytes or hashlib.sha256(content).hexdigest() != first.sha256:
            context.abort(grpc.StatusCode.DATA_LOSS, "the bytes do not have the hash that was announced")
        gateway.blobs[first.sha256] = bytes(content)
        gateway.partial.pop(first.sha256, None)
        return artifacts_pb2.UploadArtifactResponse(sha256=first.sha256, size_bytes=len(content))

    def DownloadArtifact(self, request, context):
        gateway = self._gateway
        gateway.enter("DownloadArtifact", request, context)
        content = gateway.blobs.get(request.sha256)
        if content is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such artifact")
        if gateway.corrupt_downloads > 0:
            gateway.corrupt_downloads -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        cut, gateway.cut_downloads_after = gateway.cut_downloads_after, None
        at = request.offset
        while at < len(content):
            piece = content[at:at + 1000]
            yield artifacts_pb2.DownloadArtifactResponse(data=piece, size_bytes=len(content) if at == request.offset else 0)
            at += len(piece)
            if cut is not None and at >= cut:
                context.abort(grpc.StatusCode.UNAVAILABLE, "scripted break")


class _Sites(sites_pb2_grpc.SitesServicer):

    def __init__(self, gateway):
        self._gateway = gateway

    def ListSites(self, request, context):
        self._gateway.enter("ListSites", request, context)
        return sites_pb2.ListSitesResponse(sites=[sites_pb2.Site(
            name="local", state=sites_pb2.SITE_STATE_READY, scheduler="process", slots=2, agent_version="0.1.0")])

    def GetSite(self, request, context):
        self._gateway.enter("GetSite", request, context)
        if request.name != "local":
            context.abort(grpc.StatusCode.NOT_FOUND, f"there is no site '{request.name}'; did you mean 'local'?")
        return sites_pb2.Site(name="local", state=sites_pb2.SITE_STATE_READY, partitions=["main"], address="here")

    def PauseSite(self, request, context):
        self._gateway.enter("PauseSite", request, context)
        return sites_pb2.Site(name=request.name, state=sites_pb2.SITE_STATE_PAUSED, reason=request.reason)

    def ResumeSite(self, request, context):
        self._gateway.enter("ResumeSite", request, context)
        return sites_pb2.Site(name=request.name, state=sites_pb2.SITE_STATE_READY)

    def GetVersion(self, request, context):
        self._gateway.enter("GetVersion", request, context)
        return sites_pb2.GetVersionResponse(version="0.1.0", api=self._gateway.api, started_us=1_700_000_000_000_000)
