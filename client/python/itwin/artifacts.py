"""Files that travel: up by content hash and in chunks that can be resumed, down checked and put in place atomically."""

import errno
import hashlib
import os
import pathlib
import sys

import grpc

from itwin.connection import Backoff, is_transient
from itwin.errors import DamagedError, ItwinError, LimitError, SpecError, UnavailableError
from itwin.v1 import artifacts_pb2

CHUNK_BYTES = 512 << 10      # the contract allows 1 MiB
PROGRESS_FROM_BYTES = 8 << 20  # a bar is shown for transfers of at least this size
TRIES = 8                    # broken-off transfers in a row without a new byte


class ProgressBar:
    """One line on stderr, rewritten in place; silent for small transfers and when not wanted."""

    def __init__(self, title, total, shown=None):
        large = total >= PROGRESS_FROM_BYTES
        self._shown = large if shown is None else shown
        self._title, self._total, self._percent = title, max(total, 1), -1

    def at(self, done):
        percent = min(100, int(100 * done / self._total))
        if not self._shown or percent == self._percent:
            return
        self._percent = percent
        filled = percent // 4
        end = "\n" if percent == 100 else ""
        print(f"\r{self._title} [{'#' * filled}{'.' * (25 - filled)}] {percent:3d} %", end=end, file=sys.stderr, flush=True)


def hash_file(path):
    """(SHA-256 as hex, size in bytes) of what the file holds now."""
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while True:
            block = file.read(1 << 20)
            if not block:
                return digest.hexdigest(), size
            digest.update(block)
            size += len(block)


def upload(connection, paths, progress=None):
    """Makes sure the gateway holds the content of each file; {path: sha256}. What it has already is not sent."""
    known, by_hash = {}, {}
    for path in paths:
        try:
            known[path], size = hash_file(path)
        except OSError as error:
            raise SpecError(f"{path} cannot be read ({error.strerror}); check the path and its permissions.") from None
        by_hash[known[path]] = (path, size)
    hashes = list(by_hash)
    for first in range(0, len(hashes), 10_000):
        part = hashes[first:first + 10_000]
        for status in _stat(connection, part):
            if not status.complete:
                path, size = by_hash[status.sha256]
                _upload_one(connection, path, status.sha256, size, status.received_bytes, progress)
    return known


def _patience(size):
    """Seconds after which a transfer of that many bytes is taken for dead, and resumed."""
    return 120 + size / (64 << 10)


def _stat(connection, hashes):
    return connection.call("Artifacts", "StatArtifacts", artifacts_pb2.StatArtifactsRequest(sha256=hashes),
                           "ask for files").artifacts


def _upload_one(connection, path, sha256, size, offset, progress):
    bar = ProgressBar(f"uploading {os.path.basename(path)}", size, progress)
    backoff, failures = Backoff(), 0
    while True:
        try:
            response = connection.stream("Artifacts", "UploadArtifact", _chunks(path, sha256, size, offset, bar),
                                         timeout=_patience(size - offset))
            if response.sha256 != sha256 or response.size_bytes != size:
                raise DamagedError(f"the gateway stored {path} as something else; submit again.")
            bar.at(size)
            return
        except OSError as error:
            raise SpecError(f"{path} cannot be read ({error.strerror}).") from None
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.DATA_LOSS or (
                    error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN) and
                    hash_file(path) != (sha256, size)):
                raise DamagedError(f"{path} changed while it was uploaded, or was damaged on the way "
                                   f"({error.details()}); submit again.") from None
            if not is_transient(error) and error.code() != grpc.StatusCode.ABORTED:
                raise connection.error(error, f"upload {path}") from None
            status = _stat(connection, [sha256])[0]
            if status.complete:
                bar.at(size)
                return
            failures = failures + 1 if status.received_bytes <= offset else 0
            offset = status.received_bytes
            if failures >= TRIES or not connection.pause(backoff.next()):
                raise connection.error(error, f"upload {path}") from None


def _chunks(path, sha256, size, offset, bar):
    with open(path, "rb") as file:
        file.seek(offset)
        first, done = True, offset
        while first or done < size:
            data = file.read(min(CHUNK_BYTES, size - done))
            if not data and done < size:
                return  # the file became shorter: the gateway sees that bytes are missing
            if first:
                yield artifacts_pb2.UploadArtifactRequest(sha256=sha256, size_bytes=size, offset=offset, data=data)
            else:
                yield artifacts_pb2.UploadArtifactRequest(data=data)
            first, done = False, done + len(data)
            bar.at(min(done, size - 1))


def target_path(directory, relative):
    """Where an output goes below `directory`. Raises DamagedError for a path that would leave it."""
    pure = pathlib.PurePosixPath(relative)
    if (not relative or pure.is_absolute() or "\\" in relative or "\0" in relative
            or any(part in ("..", "") for part in relative.split("/"))):
        raise DamagedError(f"the gateway names an output {relative!r}, which would lie outside the target; not downloaded.")
    root = os.path.realpath(directory)
    path = pathlib.Path(root, *pure.parts)
    if os.path.commonpath([root, os.path.realpath(path.parent)]) != root:
        raise DamagedError(f"{path.parent} leads out of {root} through a link; not downloaded.")
    return path


def download(connection, output, directory, progress=None):
    """Puts one output file in place and returns its path. The final name only ever holds the checked content; what a
    broken-off transfer left in `<name>.part` is gone on with."""
    path = target_path(directory, output.path)
    if path.is_symlink():
        raise ItwinError(f"{path} is a link; remove it or download into another directory.")
    if path.is_dir():
        raise ItwinError(f"{path} is a directory, but the job has an output of that name; download elsewhere.")
    expected = (output.sha256, output.size_bytes)
    if path.is_file() and path.stat().st_size == output.size_bytes and hash_file(path) == expected:
        return path
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(2):  # a damaged rest of an earlier transfer costs one fresh start
            resumed = _fetch(connection, output, part, progress)
            if hash_file(part) == expected:
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, path)
                return path
            part.unlink()
            if not resumed:
                break
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LimitError(f"no space left for {path}: free some and download again; it goes on where it stopped.") from None
        raise ItwinError(f"{path} cannot be written ({error.strerror}).") from None
    raise DamagedError(f"{output.path} arrived with another SHA-256 than the job recorded; nothing was kept. Download again; "
                       "if it repeats, the gateway's copy is damaged.")


def _fetch(connection, output, part, progress):
    """Appends to `part` until it has the output's size. Returns whether it went on with bytes of an earlier transfer."""
    if part.is_symlink():
        part.unlink()
    bar = ProgressBar(f"downloading {output.path}", output.size_bytes, progress)
    backoff, failures, resumed = Backoff(), 0, None
    with open(part, "ab") as file:
        if file.tell() > output.size_bytes:
            file.truncate(0)
        while True:
            start = file.seek(0, os.SEEK_END)
            resumed = start > 0 if resumed is None else resumed
            if start == output.size_bytes:
                return resumed
            request = artifacts_pb2.DownloadArtifactRequest(sha256=output.sha256, offset=start)
            call, error = connection.stream("Artifacts", "DownloadArtifact", request,
                                            timeout=_patience(output.size_bytes - start)), None
            try:
                done = start
                for message in call:
                    done += len(message.data)
                    if done > output.size_bytes or message.size_bytes not in (0, output.size_bytes):
                        raise DamagedError(f"the gateway sends more of {output.path} than the job recorded; not kept.")
                    file.write(message.data)
                    bar.at(done)
            except grpc.RpcError as rpc_error:
                error = rpc_error
                if not is_transient(error):
                    raise connection.error(error, f"download {output.path}") from None
            finally:
                call.cancel()
                file.flush()
            failures = failures + 1 if done == start else 0
            if done < output.size_bytes and (failures >= TRIES or not connection.pause(backoff.next())):
                if error is not None:
                    raise connection.error(error, f"download {output.path}") from None
                raise UnavailableError(f"the gateway stops sending {output.path} before its end; try again later.")
