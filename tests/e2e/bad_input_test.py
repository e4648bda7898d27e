"""What users get wrong, and programs that misbehave: a clear sentence, nothing lost, nothing half-done."""
import json
import subprocess

import grpc
import pytest
from google.protobuf import json_format
from harness import BIN, jobs_pb2, spec_pb2, wait_for

CSV = "a,b,y\n" + "".join(f"{i % 7},{i % 5},{(i % 7) * 0.5 - (i % 5)}\n" for i in range(64))


def train(**changes):
    """A small regression job as a document; `changes` replace keys of `train`."""
    document = {
        "name": "regression",
        "resources": {"ranks_per_node": 2},
        "train": {
            "model": {"builtin": "mlp", "options": {"hidden": [8]}},
            "data": {"csv": {"path": "data.csv", "inputs": ["a", "b"], "targets": ["y"]},
                     "split": {"train": "0..48", "test": "48..64"}},
            "loss": "mse", "optimizer": {"adam": {"lr": 0.01}}, "batch": 16, "epochs": 2,
        },
    }
    document["train"].update(changes)
    return document


def validate(w, document):
    text = document if isinstance(document, str) else json.dumps(document)
    return w.jobs.ValidateJob(jobs_pb2.ValidateJobRequest(document=text), timeout=30).spec


def submit_training(w, document, csv=CSV):
    spec = validate(w, document)
    spec.inputs.add(path="data.csv", sha256=w.upload(csv.encode()))
    return w.submit(spec)


@pytest.mark.parametrize("change, words", [
    ({"epoch": 2}, ["train", "epoch", "epochs"]),
    ({"optimizer": {"adam": {"lrr": 1}}}, ["train.optimizer.adam", "lrr", "lr"]),
    ({"batch": "many"}, ["train.batch", "many"]),
    ({"batch": -1}, ["train.batch", "-1"]),
    ({"epochs": 10**10}, ["train.epochs"]),
    ({"model": {"builtin": "resnet81"}}, ["train.model", "resnet81", "resnet18"]),
    ({"loss": "msee"}, ["train.loss", "msee", "mse"]),
    ({"model": {"builtin": "mlp", "torchscript": "x.pt"}}, ["builtin", "torchscript"]),
    ({"data": {"csv": {"path": "data.csv"}, "split": {"train": "9..3"}}}, ["train.data.split.train", "9..3"]),
])
def test_a_wrong_spec_is_refused_with_its_field(world_shared, change, words):
    with pytest.raises(grpc.RpcError) as error:
        validate(world_shared, train(**change))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    for word in words:
        assert word in error.value.details()


def archive_of(operators):
    """The head of a model archive (docs/models.md): all that is read before a job is queued."""
    manifest = json.dumps({"format": 1, "operators": operators})
    header = json.dumps({"__metadata__": {"itwin.manifest": manifest}}).encode()
    return len(header).to_bytes(8, "little") + header


def test_a_model_that_needs_another_libtorch_is_refused_before_it_is_queued(world_shared):
    known = json.loads(subprocess.run([BIN / "itwin-worker", "--operators"], check=True, capture_output=True).stdout)
    # On the allow-list; 1.13 has neither, 2.6 not the second.
    newer = ("aten::rms_norm", "aten::_fused_rms_norm")
    lacking = [name for name in newer if name not in {there.split(".")[0] for there in known["operators"]}]
    assert lacking, "this LibTorch has everything; name a newer operator"
    spec = validate(world_shared, train(model={"archive": "net.itw"}))
    spec.inputs.add(path="data.csv", sha256=world_shared.upload(CSV.encode()))
    archive = spec.inputs.add(path="net.itw", sha256=world_shared.upload(archive_of(["aten::linear", lacking[0]])))
    before = len(world_shared.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=30).jobs)
    with pytest.raises(grpc.RpcError) as error:
        world_shared.submit(spec)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"train.model.archive: the LibTorch of site local ({known['libtorch']}) does not have {lacking[0]};" in error.value.details()
    assert len(world_shared.jobs.ListJobs(jobs_pb2.ListJobsRequest(), timeout=30).jobs) == before
    # Without it the job is queued; what else is wrong with this archive is for the worker to find.
    archive.sha256 = world_shared.upload(archive_of(["aten::linear"]))
    assert world_shared.submit(spec)


def test_invalid_utf8_is_refused(world_shared):
    # protobuf refuses invalid UTF-8 in strings on the client's side, so the bytes are sent as they would be by others.
    call = world_shared.channel.unary_unary("/itwin.v1.Jobs/ValidateJob")
    with pytest.raises(grpc.RpcError) as error:
        call(b"\x12\x04\xff\xfe\xfd\xfc", timeout=30)
    assert error.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL)
    assert world_shared.answers()


def test_a_spec_of_100_mib_is_refused(world_shared):
    with pytest.raises(grpc.RpcError) as error:
        validate(world_shared, "name: " + "x" * (100 << 20))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert world_shared.answers()


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", "", "a\nb"])
def test_a_path_that_leaves_its_directory_is_refused(world_shared, path):
    spec = world_shared.shell("true", inputs={"fine": b"1"})
    spec.inputs[0].path = path
    with pytest.raises(grpc.RpcError) as error:
        world_shared.submit(spec)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "inputs" in error.value.details()


def test_an_input_that_was_never_uploaded_is_named(world_shared):
    spec = world_shared.shell("true")
    spec.inputs.add(path="data.bin", sha256="0" * 64)
    with pytest.raises(grpc.RpcError) as error:
        world_shared.submit(spec)
    assert error.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "data.bin" in error.value.details()


def test_request_ids(world_shared):
    spec = world_shared.shell("true", name="one")
    first = world_shared.submit(spec, "same-request")
    assert world_shared.submit(spec, "same-request") == first
    with pytest.raises(grpc.RpcError) as error:
        world_shared.submit(world_shared.shell("false", name="other"), "same-request")
    assert error.value.code() == grpc.StatusCode.ALREADY_EXISTS
    world_shared.wait_final(first)
    assert world_shared.submit(spec, "same-request") == first  # also when it has ended


def test_more_ranks_than_slots_is_refused(world_shared):
    with pytest.raises(grpc.RpcError) as error:
        world_shared.submit(world_shared.shell("true", ranks_per_node=64))
    assert error.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION)
    assert "64" in error.value.details() and "4" in error.value.details()


def failed(w, job, failure, *words):
    end = w.wait_final(job)
    assert end.state == jobs_pb2.JOB_STATE_FAILED, end
    assert end.failure == failure, end
    for word in words:
        assert word in end.reason, end.reason
    w.check_exactly_once(job)
    return end


def test_a_program_that_does_not_exist(world_shared):
    spec = spec_pb2.JobSpec(name="typo", command=spec_pb2.CommandSpec(argv=["no-such-program"]))
    failed(world_shared, world_shared.submit(spec), jobs_pb2.FAILURE_CLASS_USER, "no-such-program")


def test_an_exit_code_and_the_last_words_are_told(world_shared):
    job = world_shared.submit(world_shared.shell("echo the reason is bad luck >&2; exit 7"))
    failed(world_shared, job, jobs_pb2.FAILURE_CLASS_APP, "7", "bad luck")


def test_a_signal_is_told(world_shared):
    failed(world_shared, world_shared.submit(world_shared.shell("kill -SEGV $$")), jobs_pb2.FAILURE_CLASS_APP, "SIGSEGV")


def test_training_runs_and_is_summed_up(world_shared):
    job = submit_training(world_shared, train())
    end = world_shared.wait_final(job)
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED, end.reason
    assert "test/rmse" in end.summary
    world_shared.check_exactly_once(job)
    paths = {o.path for o in world_shared.jobs.ListOutputs(jobs_pb2.ListOutputsRequest(job=job)).outputs}
    assert "weights.safetensors" in paths


def test_a_loss_that_is_not_finite(world_shared):
    document = train(optimizer={"sgd": {"lr": 1e30}}, epochs=20)
    end = failed(world_shared, submit_training(world_shared, document), jobs_pb2.FAILURE_CLASS_APP, "finite", "step", "rank")
    assert end.attempt == 1


def test_a_missing_column_names_those_there_are(world_shared):
    data = train()["train"]["data"]
    data["csv"]["inputs"] = ["a", "bb"]
    failed(world_shared, submit_training(world_shared, train(data=data)), jobs_pb2.FAILURE_CLASS_USER, "bb", "b")


def test_an_empty_data_set(world_shared):
    failed(world_shared, submit_training(world_shared, train(), csv="a,b,y\n"), jobs_pb2.FAILURE_CLASS_USER)


def test_a_wrong_shape_names_both(world_shared):
    document = train(model={"builtin": "cnn"})
    failed(world_shared, submit_training(world_shared, document), jobs_pb2.FAILURE_CLASS_USER, "cnn")


def test_garbage_in_the_metrics_file_is_counted_and_skipped(world_shared):
    script = r"""
printf '{"step":1,"metrics":{"a":1}}\n' >>$ITWIN_METRICS
printf 'garbage \xff\xfe{{{\n' >>$ITWIN_METRICS
head -c 100000 /dev/urandom | tr -d '\n' >>$ITWIN_METRICS; echo >>$ITWIN_METRICS
printf '{"step":2,"metrics":{"%s":1}}\n' "$(head -c 100000 /dev/zero | tr '\0' n)" >>$ITWIN_METRICS
printf '{"step":"x","metrics":[]}\n' >>$ITWIN_METRICS
printf '{"step":3,"metrics":{"a":3,"b":"NaN"}}\n' >>$ITWIN_METRICS
printf '{"step":4,"metr' >>$ITWIN_METRICS
"""
    job = world_shared.submit(world_shared.shell(script))
    assert world_shared.wait_final(job).state == jobs_pb2.JOB_STATE_SUCCEEDED
    points = world_shared.points(job)[1]
    assert [(s, n) for s, n, _ in points if s == "a"] == [("a", 1), ("a", 3)]
    assert any(s == "b" and v != v for s, _, v in points)
    assert all(len(s) <= 200 for s, _, _ in points)
    notes = [e.message for e in world_shared.events(job) if e.kind == "note"]
    assert any("line" in note for note in notes), notes


def test_a_program_that_prints_a_gigabyte(world_shared):
    job = world_shared.submit(world_shared.shell("echo first; head -c 1000000000 /dev/zero | tr '\\0' 'x'; echo last >&2"))
    end = world_shared.wait_final(job, 240)
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED, end.reason
    part = world_shared.jobs.ReadLog(jobs_pb2.ReadLogRequest(job=job, stream=jobs_pb2.LOG_STREAM_STDOUT), timeout=60)
    assert part.data.startswith(b"first\nxxx")
    assert part.size <= 80 << 20
    assert part.dropped_bytes + part.size >= 1_000_000_000
    assert world_shared.log(job, jobs_pb2.LOG_STREAM_STDERR).startswith("last")
    directory = world_shared.attempt_directory(job, 1)
    assert (directory / "stdout.log").stat().st_size <= 80 << 20


def test_wall_limit_of_a_program_that_does_not_save(world_shared):
    spec = world_shared.shell("sleep 600")
    spec.resources.time.FromSeconds(2)
    failed(world_shared, world_shared.submit(spec), jobs_pb2.FAILURE_CLASS_LIMIT, "time")


def test_exit_85_goes_on_from_the_checkpoint(world_shared):
    script = """
n=0; [ -z "$ITWIN_RESUME" ] || n=$(cat $ITWIN_RESUME/n)
n=$((n+1)); echo $n >$ITWIN_CHECKPOINTS/n
printf '{"step":%d,"metrics":{"n":%d}}\\n' $n $n >>$ITWIN_METRICS
[ $n -ge 4 ] || exit 85
echo $n >$ITWIN_OUTPUTS/n
"""
    job = world_shared.submit(world_shared.shell(script))
    end = world_shared.wait_final(job)
    assert end.state == jobs_pb2.JOB_STATE_SUCCEEDED, end.reason
    assert end.attempt == 4
    world_shared.check_exactly_once(job)


def test_exit_85_without_progress_ends_the_chain(world_shared):
    job = world_shared.submit(world_shared.shell("exit 85"))
    end = world_shared.wait_final(job)
    assert end.state == jobs_pb2.JOB_STATE_FAILED
    assert "progress" in end.reason
    assert end.attempt <= 3


def test_retry_is_a_new_job(world_shared):
    marker = world_shared.directory / "marker"
    job = world_shared.submit(world_shared.shell(f"[ -e {marker} ] || exit 1"))
    world_shared.wait_final(job)
    marker.touch()
    again = world_shared.jobs.RetryJob(jobs_pb2.RetryJobRequest(job=job, request_id="retry-1"), timeout=30).job
    assert again.id != job and again.retry_of == job
    assert world_shared.wait_final(again.id).state == jobs_pb2.JOB_STATE_SUCCEEDED
    assert world_shared.job(job).state == jobs_pb2.JOB_STATE_FAILED


def test_unique_prefixes_and_unknown_jobs(world_shared):
    job = world_shared.submit(world_shared.shell("true"))
    assert world_shared.job(job[:8]).id == job
    with pytest.raises(grpc.RpcError) as error:
        world_shared.job("ffffffffffffffff")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_without_a_token_nothing_is_told(world_shared):
    ca = next((world_shared.data / "client").glob("ca*")).read_bytes()
    address = (world_shared.data / "run" / "endpoint").read_text().strip()
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)) as channel:
        stub = type(world_shared.jobs)(channel)
        with pytest.raises(grpc.RpcError) as error:
            stub.ListJobs(jobs_pb2.ListJobsRequest(), timeout=10)
        assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
    with grpc.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as error:
            type(world_shared.jobs)(channel).ListJobs(jobs_pb2.ListJobsRequest(), timeout=10)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_no_secret_lies_about(world_shared):
    """The token's text is in its own file and nowhere else below the data directory."""
    token = next((world_shared.data / "client").glob("token*")).read_text().strip()
    assert len(token) > 20
    for path in world_shared.directory.rglob("*"):
        if path.is_file() and not path.name.startswith("token"):
            assert token.encode() not in path.read_bytes(), path
    for path in (world_shared.data / "client").iterdir():
        assert path.stat().st_mode & 0o077 == 0, path


def test_health_and_reflection(world_shared):
    # Generic tools find the services: the reflection service lists them.
    from itwin.v1 import sites_pb2
    call = world_shared.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert call(b"", timeout=10) == b"\x08\x01"
    stream = world_shared.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
    reply = next(stream(iter([b"\x3a\x00"]), timeout=10))
    for name in (b"itwin.v1.Jobs", b"itwin.v1.Artifacts", b"itwin.v1.Sites"):
        assert name in reply
    assert json_format.MessageToDict(world_shared.sites.GetVersion(sites_pb2.GetVersionRequest()))["api"] == 1
