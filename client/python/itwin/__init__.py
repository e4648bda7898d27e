"""Train on a supercomputer from a notebook.

    import itwin
    gw = itwin.connect()
    job = gw.submit("job.yaml")
    job.watch()
    net = job.result().load(net)

A *job* is what was submitted; an *attempt* is one try at it on a site; a *point* is one value of one metric series.
"""

try:
    from itwin.v1 import jobs_pb2 as _jobs_pb2  # noqa: F401  (only to fail early, with a useful message)
except ModuleNotFoundError as _error:
    if _error.name and _error.name.startswith("itwin"):
        raise ImportError(
            "itwin's generated stubs (itwin.v1) are not beside the package. Build the target itwin_python and use "
            "<build>/python on PYTHONPATH, or install <build>/python-package with pip.") from None
    raise ImportError(
        f"itwin needs the Python package '{_error.name}'. Install grpcio and protobuf "
        "(Debian: apt install python3-grpcio python3-protobuf).") from None

from itwin import errors
from itwin.archive import export
from itwin.errors import ItwinError
from itwin.gateway import Gateway, connect
from itwin.job import Job
from itwin.result import Result
from itwin.version import __version__

__all__ = ["Gateway", "ItwinError", "Job", "Result", "connect", "errors", "export", "__version__"]
