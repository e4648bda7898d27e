"""One channel to one gateway: TLS, the token on every call, and the only place where a call is repeated."""

import random
import threading
import time

import grpc

from itwin import config
from itwin.errors import ItwinError, from_rpc, is_tls_failure
from itwin.v1 import artifacts_pb2_grpc, jobs_pb2_grpc, sites_pb2_grpc

CALL_SECONDS = 20.0      # one try of a unary call
PATIENCE_SECONDS = 60.0  # all tries of a unary call together
FIRST_DELAY_SECONDS = 0.1
LONGEST_DELAY_SECONDS = 2.0
LIMIT_TRIES = 4          # tries when the gateway says that it is at a limit
MAX_MESSAGE_BYTES = 64 << 20

_STUBS = {
    "Jobs": jobs_pb2_grpc.JobsStub,
    "Artifacts": artifacts_pb2_grpc.ArtifactsStub,
    "Sites": sites_pb2_grpc.SitesStub,
}


class Backoff:
    """Growing, jittered pauses: full length at most LONGEST_DELAY_SECONDS."""

    def __init__(self):
        self._next = FIRST_DELAY_SECONDS

    def reset(self):
        self._next = FIRST_DELAY_SECONDS

    def next(self):
        delay = self._next * (0.5 + random.random() / 2)
        self._next = min(self._next * 2, LONGEST_DELAY_SECONDS)
        return delay


class Connection:
    """Thread-safe. Every call that repeats is idempotent: reads, or calls that carry a request id or a content hash."""

    def __init__(self, settings):
        self.settings = settings
        self.endpoint = settings.endpoint
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._metadata = (("authorization", f"Bearer {settings.token}"),)
        self._open()

    def _open(self):
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            # Our own retries know which calls are idempotent.
            ("grpc.enable_retries", 0),
        ]
        if config.is_loopback(self.endpoint):
            options.append(("grpc.enable_http_proxy", 0))
        if self.settings.server_name:
            options.append(("grpc.ssl_target_name_override", self.settings.server_name))
        if self.settings.insecure:
            self._channel = grpc.insecure_channel(self.endpoint, options)
        else:
            credentials = grpc.ssl_channel_credentials(root_certificates=self.settings.ca)
            self._channel = grpc.secure_channel(self.endpoint, credentials, options)
        self._stubs = {name: stub(self._channel) for name, stub in _STUBS.items()}

    def call(self, service, method, request, doing="", timeout=CALL_SECONDS, patience=PATIENCE_SECONDS):
        """A unary call, repeated while the gateway is away, at most `patience` seconds in all."""
        deadline = time.monotonic() + patience
        backoff, limited = Backoff(), 0
        while True:
            left = max(0.05, deadline - time.monotonic())
            stub = self._stubs[service]
            try:
                return getattr(stub, method)(request, timeout=min(timeout, left), metadata=self._metadata)
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                    limited += 1
                    if limited >= LIMIT_TRIES:
                        raise from_rpc(error, self.endpoint, doing) from None
                elif not is_transient(error):
                    raise from_rpc(error, self.endpoint, doing) from None
                if time.monotonic() >= deadline or not self.pause(min(backoff.next(), left)):
                    raise from_rpc(error, self.endpoint, doing) from None
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    self.reopen(stub, service)  # nothing came: the connection may be half dead
            except ValueError:  # another thread has replaced the channel just now
                if self._closed.is_set():
                    raise ItwinError("this connection was closed; call itwin.connect() again.") from None

    def stream(self, service, method, request, timeout=None):
        """A streaming call, tried once. `request` is a message, or an iterator of messages."""
        while True:
            try:
                return getattr(self._stubs[service], method)(request, timeout=timeout, metadata=self._metadata)
            except ValueError:  # as in call()
                if self._closed.is_set():
                    raise ItwinError("this connection was closed; call itwin.connect() again.") from None

    def error(self, rpc_error, doing=""):
        return from_rpc(rpc_error, self.endpoint, doing)

    def pause(self, seconds):
        """Waits; False when the connection was closed meanwhile."""
        return not self._closed.wait(seconds)

    def reopen(self, stub=None, service="Jobs"):
        """Replaces the channel, unless another thread has done so since `stub` was taken."""
        with self._lock:
            if self._closed.is_set() or (stub is not None and self._stubs[service] is not stub):
                return
            old = self._channel
            self._open()
        old.close()

    def close(self):
        self._closed.set()
        with self._lock:
            self._channel.close()


def is_transient(error):
    """Whether the same call may work in a moment: the gateway restarts, the network blinks."""
    code, detail = error.code(), error.details() or ""
    if code == grpc.StatusCode.UNAVAILABLE:
        return not is_tls_failure(detail)
    if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return True
    # What a peer that dies in mid-call looks like to gRPC.
    return (code == grpc.StatusCode.INTERNAL and "RST_STREAM" in detail) or (
        code == grpc.StatusCode.UNKNOWN and "Stream removed" in detail)
