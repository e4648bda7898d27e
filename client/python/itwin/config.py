"""Where the gateway is and how to prove who we are.

Precedence for each value: argument, environment (ITWIN_ENDPOINT; ITWIN_TOKEN_FILE or ITWIN_TOKEN; ITWIN_CA_FILE;
ITWIN_SERVER_NAME; ITWIN_INSECURE=1), then the file $ITWIN_CONFIG or ~/.config/itwin/config.yaml with `key: value` lines:
endpoint, ca_file, token_file (paths relative to that file), server_name, insecure. The same as the `itwin` command's.

A token from the file is sent to another endpoint than the file's only when the file also names the CA that the
other endpoint must prove itself with.
"""

import dataclasses
import difflib
import ipaddress
import os
import pathlib

from itwin.errors import ConfigError

_KEYS = ("endpoint", "ca_file", "token_file", "server_name", "insecure")
_MAX_FILE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a connection needs. `ca` is PEM bytes or None for the system's certificates."""
    endpoint: str
    token: str = dataclasses.field(repr=False, default="")
    ca: bytes = dataclasses.field(repr=False, default=None)
    insecure: bool = False
    server_name: str = ""  # in the gateway's certificate, when the endpoint is a forwarded port


def load(endpoint=None, token=None, ca=None, insecure=False, environ=None):
    """Settings from arguments, environment and file. Raises ConfigError naming what is missing and where to put it."""
    environ = os.environ if environ is None else environ
    path = config_path(environ)
    file = _read_file(path) if path.exists() else {}
    if not file and environ.get("ITWIN_CONFIG"):
        raise ConfigError(f"ITWIN_CONFIG names {path}, which " + (
            "holds no settings." if path.exists() else "does not exist.") +
            " It should have lines 'endpoint: host:port', 'ca_file: …' and 'token_file: …'.")

    chosen = endpoint or environ.get("ITWIN_ENDPOINT") or file.get("endpoint")
    insecure = insecure or _true(environ.get("ITWIN_INSECURE", ""), "ITWIN_INSECURE") or _true(
        file.get("insecure", ""), f"insecure in {path}")
    server_name = environ.get("ITWIN_SERVER_NAME") or file.get("server_name", "")
    if not chosen:
        raise ConfigError(
            "no gateway is named. Pass itwin.connect('host:port', …), set ITWIN_ENDPOINT, or write "
            f"'endpoint: host:port' into {path}.")
    chosen = normalize_endpoint(chosen)

    if ca is not None:
        pem = _pem(ca, "ca")
    elif environ.get("ITWIN_CA_FILE"):
        pem = _read(pathlib.Path(environ["ITWIN_CA_FILE"]), "ITWIN_CA_FILE")
    elif "ca_file" in file:
        pem = _read(path.parent / os.path.expanduser(file["ca_file"]), f"ca_file in {path}")
    else:
        pem = None

    if token is not None:
        value = _token_file(pathlib.Path(token), "token") if isinstance(token, os.PathLike) else str(token).strip()
    elif environ.get("ITWIN_TOKEN_FILE"):
        value = _token_file(pathlib.Path(environ["ITWIN_TOKEN_FILE"]), "ITWIN_TOKEN_FILE")
    elif environ.get("ITWIN_TOKEN"):
        value = environ["ITWIN_TOKEN"].strip()
    elif "token_file" in file:
        same = "endpoint" in file and normalize_endpoint(file["endpoint"]) == chosen
        file_ca = ca is None and not environ.get("ITWIN_CA_FILE") and "ca_file" in file
        if not same and (insecure or not file_ca):
            raise ConfigError(
                f"the token in {path} belongs to {file.get('endpoint', 'another gateway')} and is not sent to {chosen}. "
                "Pass token=… or set ITWIN_TOKEN_FILE for this gateway.")
        value = _token_file(path.parent / os.path.expanduser(file["token_file"]), f"token_file in {path}")
    else:
        raise ConfigError(
            f"no token for {chosen}. Pass token=…, set ITWIN_TOKEN_FILE, or write 'token_file: …' into {path}.")
    if not value or any(c.isspace() or ord(c) < 33 or ord(c) > 126 for c in value):
        raise ConfigError("the token is empty or holds characters that a token cannot have: it is one line of letters, "
                          "digits and signs. Check the token file.")
    if insecure and not is_loopback(chosen):
        raise ConfigError(
            f"insecure=True would send the token to {chosen} in the clear; it is allowed for this machine only "
            "(127.0.0.1, ::1, localhost). Use TLS: leave insecure out and pass ca=….")
    return Settings(chosen, value, pem, insecure, server_name)


def _true(text, what):
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("", "0", "false", "no"):
        return False
    raise ConfigError(f"{what} is '{text}'; use true or false.")


def config_path(environ=None):
    """The file that holds endpoint, CA and token; it may not exist."""
    environ = os.environ if environ is None else environ
    if environ.get("ITWIN_CONFIG"):
        return pathlib.Path(os.path.expanduser(environ["ITWIN_CONFIG"]))
    return pathlib.Path(environ.get("HOME") or os.path.expanduser("~")) / ".config" / "itwin" / "config.yaml"


def normalize_endpoint(text):
    """"host:port", from that or from "https://host:port/"."""
    text = str(text).strip()
    for scheme in ("https://", "grpcs://", "dns:///", "dns:"):
        if text.lower().startswith(scheme):
            text = text[len(scheme):]
            break
    text = text.rstrip("/")
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 65536 or any(c in text for c in "/ \t\n"):
        raise ConfigError(f"'{text}' is not an endpoint: it is host:port, for example gateway.example.org:7443.")
    return text


def is_loopback(endpoint):
    """Whether host:port is this machine."""
    host = endpoint.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _read_file(path):
    values = {}
    text = _read(path, "configuration file").decode("utf-8", "replace")
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#") or line in ("---", "..."):
            continue
        key, colon, value = (line + " ").partition(": ")
        key, value = key.strip(), value.strip()
        if not colon:
            raise ConfigError(f"{path} line {number} is not 'key: value'. Known keys: {', '.join(_KEYS)}.")
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, 1)
            raise ConfigError(f"{path} line {number}: unknown key '{key}'" +
                              (f"; did you mean '{near[0]}'?" if near else f". Known keys: {', '.join(_KEYS)}."))
        if value[:1] in ("'", '"') and value.find(value[0], 1) > 0:
            value = value[1:value.find(value[0], 1)]
        else:
            value = value.split(" #", 1)[0].strip()
        if value:
            values[key] = value
    return values


def _read(path, what):
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{what}: {path} cannot be read ({error.strerror}).") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{what}: {path} is larger than 1 MiB, so it is not what it should be.")
    return content


def _token_file(path, what):
    lines = _read(path, what).decode("utf-8", "replace").strip().splitlines()
    return lines[0].strip() if lines else ""


def _pem(ca, what):
    if isinstance(ca, bytes):
        return ca
    if isinstance(ca, str) and ca.lstrip().startswith("-----BEGIN"):
        return ca.encode()
    return _read(pathlib.Path(ca), what)
