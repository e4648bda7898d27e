"""Connecting: TLS, tokens, versions, and calls that outlive a restart."""

import threading

import grpc
import pytest

import itwin
from itwin import connection as connections
from itwin.errors import (AuthenticationError, LimitError, NotFoundError, ServerError, StateError, TlsError, UnavailableError,
                          VersionError)
from conftest import wait_until
from fake_gateway import TOKEN, make_certificates


def test_connects_over_tls_and_tells_the_version(gw):
    assert gw.version().version == "0.1.0"
    assert gw.sites()[0].name == "local" and gw.sites()[0].state == "READY"
    assert "local" in repr(gw.sites()) and "<td>local</td>" in gw.sites()._repr_html_()


def test_wrong_token_is_explained_without_grpc_words(fake, certificates):
    with pytest.raises(AuthenticationError, match="refused the token.*ITWIN_TOKEN_FILE") as info:
        itwin.connect(fake.endpoint, token="wrong", ca=certificates / "ca.pem")
    assert info.value.__cause__ is None and info.value.__suppress_context__
    assert "wrong" not in str(info.value)


def test_another_ca_is_refused_at_once(fake, tmp_path):
    other = make_certificates(tmp_path)
    with pytest.raises(TlsError, match="could not be verified"):
        itwin.connect(fake.endpoint, token=TOKEN, ca=other / "ca.pem")
    assert not fake.calls  # the token was never sent


def test_nobody_listens(monkeypatch):
    monkeypatch.setattr("itwin.gateway.CONNECT_SECONDS", 0.3)
    with pytest.raises(UnavailableError, match="cannot be reached.*Check that itwin-gateway is running"):
        itwin.connect("127.0.0.1:1", token=TOKEN)


def test_other_contract_version_says_what_to_update(fake, certificates):
    fake.api = 2
    with pytest.raises(VersionError, match="speaks contract 2, this package 1; update this package"):
        itwin.connect(fake.endpoint, token=TOKEN, ca=certificates / "ca.pem")


def test_config_file_connects(fake, certificates, tmp_path, monkeypatch):
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "config.yaml").write_text(
        f"endpoint: {fake.endpoint}\nca_file: {certificates / 'ca.pem'}\ntoken_file: token\n")
    monkeypatch.setenv("ITWIN_CONFIG", str(tmp_path / "config.yaml"))
    with itwin.connect() as gateway:
        assert gateway.endpoint == fake.endpoint


def test_call_outlives_a_restart(fake, gw):
    fake.add_job()
    fake.stop()
    answers = []
    thread = threading.Thread(target=lambda: answers.append(gw.job("7f3c")))
    thread.start()
    fake.start()
    thread.join(30)
    assert answers[0].id == "7f3c0a1b2c3d4e5f"


@pytest.mark.parametrize("code, error", [
    (grpc.StatusCode.NOT_FOUND, NotFoundError), (grpc.StatusCode.FAILED_PRECONDITION, StateError),
    (grpc.StatusCode.INTERNAL, ServerError), (grpc.StatusCode.UNIMPLEMENTED, VersionError),
    (grpc.StatusCode.PERMISSION_DENIED, AuthenticationError),
])
def test_final_errors_are_not_repeated(fake, gw, code, error):
    fake.fail_next["GetJob"] = [code]
    with pytest.raises(error):
        gw.job("7f3c")
    assert [method for method, _ in fake.calls].count("GetJob") == 1


def test_a_limit_is_tried_a_few_times(fake, gw):
    fake.add_job()
    fake.fail_next["GetJob"] = [grpc.StatusCode.RESOURCE_EXHAUSTED] * 2
    assert gw.job("7f3c").state == "QUEUED"
    fake.fail_next["GetJob"] = [grpc.StatusCode.RESOURCE_EXHAUSTED] * 10
    with pytest.raises(LimitError):
        gw.job("7f3c")


def test_unknown_and_ambiguous_ids(fake, gw):
    fake.add_job("abcd000000000000")
    fake.add_job("abcd111111111111")
    with pytest.raises(NotFoundError, match="no job 'ffff'"):
        gw.job("ffff")
    with pytest.raises(StateError, match="fits 2 jobs"):
        gw.job("abcd")


def test_calls_after_close_say_so(gw):
    gw.close()
    with pytest.raises(itwin.ItwinError, match="closed"):
        gw.sites()


def test_reopened_channel_serves_waiting_threads(fake, gw):
    fake.add_job()
    job, seen = gw.job("7f3c"), []
    thread = threading.Thread(target=lambda: seen.extend(u.job.state for u in job.stream() if u.job is not None))
    thread.start()
    wait_until(lambda: seen, what="the first update")
    gw._connection.reopen()
    fake.move(fake.jobs[job.id], "SUCCEEDED")
    thread.join(30)
    assert not thread.is_alive() and job.state == "SUCCEEDED"


def test_backoff_grows_to_its_limit():
    backoff = connections.Backoff()
    delays = [backoff.next() for _ in range(20)]
    assert delays[0] <= connections.FIRST_DELAY_SECONDS
    assert all(delay <= connections.LONGEST_DELAY_SECONDS for delay in delays) and delays[-1] >= 1.0
