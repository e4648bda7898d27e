import pathlib
import re

import pytest

from itwin import config
from itwin.errors import ConfigError, ItwinError
import itwin


@pytest.fixture
def file(tmp_path):
    (tmp_path / "client.token").write_text("file-token\n")
    (tmp_path / "ca.pem").write_text("FILE CA")
    path = tmp_path / "config.yaml"
    path.write_text("# of the test\nendpoint: gateway.example:7443   # main\nca_file: ca.pem\ntoken_file: 'client.token'\n")
    return path


def test_arguments_win_over_environment_and_file(file, tmp_path):
    (tmp_path / "other.token").write_text("env-token")
    environ = {"ITWIN_CONFIG": str(file), "ITWIN_ENDPOINT": "env:1", "ITWIN_TOKEN_FILE": str(tmp_path / "other.token")}
    settings = config.load(environ=environ)
    assert (settings.endpoint, settings.token, settings.ca) == ("env:1", "env-token", b"FILE CA")
    settings = config.load("https://arg:2/", token="arg-token", ca=b"ARG CA", environ=environ)
    assert (settings.endpoint, settings.token, settings.ca) == ("arg:2", "arg-token", b"ARG CA")
    settings = config.load(environ={"ITWIN_CONFIG": str(file)})
    assert (settings.endpoint, settings.token, settings.ca) == ("gateway.example:7443", "file-token", b"FILE CA")


def test_default_file_lies_in_the_home_directory(tmp_path):
    place = tmp_path / "h" / ".config" / "itwin"
    place.mkdir(parents=True)
    (place / "config.yaml").write_text("endpoint: a:1\ntoken_file: t\n")
    (place / "t").write_text("x")
    assert config.load(environ={"HOME": str(tmp_path / "h")}).endpoint == "a:1"


def test_token_file_wins_over_token_in_the_environment(file, tmp_path):
    environ = {"ITWIN_ENDPOINT": "a:1", "ITWIN_TOKEN": "value", "HOME": str(tmp_path)}
    assert config.load(environ=environ).token == "value"
    environ["ITWIN_TOKEN_FILE"] = str(tmp_path / "client.token")
    assert config.load(environ=environ).token == "file-token"


def test_token_never_shows_in_the_settings_text(file):
    assert "file-token" not in repr(config.load(environ={"ITWIN_CONFIG": str(file)}))


def test_token_of_the_file_goes_to_another_endpoint_only_with_the_ca_of_the_file(file):
    environ = {"ITWIN_CONFIG": str(file)}
    assert config.load("127.0.0.1:9", environ=environ).token == "file-token"
    with pytest.raises(ConfigError, match="is not sent to other:9"):
        config.load("other:9", ca=b"OTHER CA", environ=environ)
    file.write_text("endpoint: a:1\ntoken_file: client.token\n")
    with pytest.raises(ConfigError, match="belongs to a:1"):
        config.load("other:9", environ=environ)


@pytest.mark.parametrize("text, message", [
    ("endpont: a:1", "unknown key 'endpont'; did you mean 'endpoint'"),
    ("endpoint a:1", "line 1 is not 'key: value'"),
    ("endpoint: a\ntoken_file: client.token", "'a' is not an endpoint"),
    ("endpoint: a:99999\ntoken_file: client.token", "is not an endpoint"),
    ("endpoint: a:1\ntoken_file: nowhere", "nowhere cannot be read"),
    ("endpoint: a:1\nca_file: nowhere\ntoken_file: client.token", "ca_file in .* cannot be read"),
    ("endpoint: a:1", "no token for a:1"),
    ("", "holds no settings"),
])
def test_bad_file_is_explained(file, text, message):
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(environ={"ITWIN_CONFIG": str(file)})


def test_nothing_configured_says_where_to_put_it(tmp_path):
    with pytest.raises(ConfigError, match=r"ITWIN_ENDPOINT.*config\.yaml"):
        config.load(environ={"HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(environ={"ITWIN_CONFIG": str(tmp_path / "none")})


def test_token_of_several_words_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="token is empty or holds"):
        config.load("a:1", token="one two")
    with pytest.raises(ConfigError, match="token is empty or holds"):
        config.load("a:1", token="")


def test_insecure_only_on_this_machine():
    assert config.load("localhost:1", token="t", insecure=True).insecure
    assert config.load("[::1]:1", token="t", insecure=True).insecure
    with pytest.raises(ConfigError, match="in the clear"):
        config.load("example.org:1", token="t", insecure=True)


def test_server_name_and_insecure_are_read_as_the_command_reads_them(file):
    file.write_text(file.read_text().replace("gateway.example", "127.0.0.1") + "server_name: gateway.example\ninsecure: true\n")
    settings = config.load(environ={"ITWIN_CONFIG": str(file)})
    assert (settings.server_name, settings.insecure) == ("gateway.example", True)
    environ = {"ITWIN_CONFIG": str(file), "ITWIN_SERVER_NAME": "other.example"}
    assert config.load(environ=environ).server_name == "other.example"
    file.write_text(file.read_text().replace("insecure: true", "insecure: maybe"))
    with pytest.raises(ConfigError, match="maybe"):
        config.load(environ={"ITWIN_CONFIG": str(file)})


def test_package_version_is_the_project_version():
    cmake = pathlib.Path(__file__).parents[2] / "CMakeLists.txt"
    assert re.search(r"project\(itwin VERSION (\S+)", cmake.read_text()).group(1) == itwin.__version__


def test_all_errors_have_one_base():
    for value in vars(itwin.errors).values():
        if isinstance(value, type) and issubclass(value, Exception):
            assert issubclass(value, ItwinError)
