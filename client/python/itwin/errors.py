"""Every error of this package: one sentence that says what went wrong, and the next step.

All derive from ItwinError. Errors of the gateway keep the gateway's own words.
"""

import grpc


class ItwinError(Exception):
    """Base of all errors of this package."""

    def _render_traceback_(self):  # what IPython shows instead of a screenful of frames
        return [f"{type(self).__name__}: {self}"]


class ConfigError(ItwinError):
    """No endpoint, no token, or a configuration file that cannot be used."""


class UnavailableError(ItwinError):
    """The gateway cannot be reached. Jobs go on without it; call again later."""


class TlsError(UnavailableError):
    """The gateway could not prove who it is (or does not speak TLS). Never retried."""


class AuthenticationError(ItwinError):
    """The token is missing, wrong, expired or lacks the right for the call."""


class SpecError(ItwinError):
    """The job, as asked for, cannot work: names the field and what would be right."""


class ModelError(SpecError):
    """The module cannot be handed over."""


class DataError(SpecError):
    """The data cannot be handed over."""


class OptimizerError(SpecError):
    """The optimizer cannot be handed over."""


class NotFoundError(ItwinError):
    """No such job or artifact."""


class StateError(ItwinError):
    """The job is in a state in which this cannot be done, or an id prefix fits several jobs."""


class ConflictError(ItwinError):
    """The request id was used before with another spec."""


class LimitError(ItwinError):
    """A quota, a limit or a full disk."""


class DamagedError(ItwinError):
    """Bytes arrived, or lie on disk, that are not what their SHA-256 or their format says."""


class VersionError(ItwinError):
    """Package and gateway do not speak the same contract."""


class ServerError(ItwinError):
    """The gateway failed in a way it did not expect: its log has more."""


class WaitTimeout(ItwinError, TimeoutError):
    """The time given to wait() is over; the job goes on."""


class JobFailedError(ItwinError):
    """The job ended without success. `job` is that job."""

    def __init__(self, message, job=None):
        super().__init__(message)
        self.job = job


class MissingPackageError(ItwinError, ImportError):
    """An optional Python package is needed for this call."""


def first_of(problems, count=3):
    """The first ones, as half a sentence that says how many more there are."""
    more = f" (and {len(problems) - count} more)" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more


def require(module, purpose):
    """Imports an optional package, or says which one to install and what for."""
    import importlib
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingPackageError(
            f"{purpose} needs the Python package '{package}', which cannot be imported ({error}). "
            f"Install it: pip install {package} (Debian: apt install python3-{package}).") from None


_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: SpecError,
    grpc.StatusCode.OUT_OF_RANGE: SpecError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: ConflictError,
    grpc.StatusCode.FAILED_PRECONDITION: StateError,
    grpc.StatusCode.ABORTED: StateError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitError,
    grpc.StatusCode.DATA_LOSS: DamagedError,
    grpc.StatusCode.UNIMPLEMENTED: VersionError,
}


def is_tls_failure(detail):
    """Whether a connection failed for its certificates rather than for want of a listener."""
    lower = detail.lower()
    return any(mark in lower for mark in (
        "certificate_verify_failed", "certificate verify failed", "handshake failed", "wrong_version_number",
        "wrong version number", "peer name", "invalid security handshake"))


def from_rpc(error, endpoint, doing=""):
    """The error a user sees for a grpc.RpcError. `doing` says what was tried: "submit the job"."""
    code, detail = error.code(), (error.details() or "").strip()
    prefix = f"cannot {doing}: " if doing else ""
    if code == grpc.StatusCode.UNAVAILABLE and is_tls_failure(detail):
        return TlsError(
            f"{prefix}the gateway at {endpoint} could not be verified over TLS ({detail}). Check that ca (ITWIN_CA_FILE, "
            "ca_file) is the gateway's own CA certificate and that the endpoint's host is named in its certificate.")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        what = "did not answer in time" if code == grpc.StatusCode.DEADLINE_EXCEEDED else "cannot be reached"
        return UnavailableError(
            f"{prefix}the gateway at {endpoint} {what} ({detail or 'no detail'}). Check that itwin-gateway is running and "
            "that the endpoint is right, then call again; submitted jobs go on meanwhile.")
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return AuthenticationError(
            f"{prefix}the gateway at {endpoint} refused the token ({detail or 'no detail'}). Ask its administrator for a "
            "token and name its file in ITWIN_TOKEN_FILE or token_file.")
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return AuthenticationError(f"{prefix}{detail or 'the token does not have the right to do this.'}")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return VersionError(
            f"{prefix}the gateway at {endpoint} does not know this call ({detail}). Update the gateway, or use the "
            "package that was built with it.")
    if code in _BY_CODE:
        return _BY_CODE[code](f"{prefix}{detail or code.name}")
    return ServerError(f"{prefix}{detail or code.name} ({code.name}). The gateway's log has more.")
