"""The gateway: submit jobs, find them again, see the sites."""

import datetime
import os
import tempfile
import typing
import uuid

from google.protobuf import json_format

from itwin import artifacts, config, render, spec as specs, states
from itwin.connection import Connection
from itwin.errors import SpecError, VersionError
from itwin.job import Job
from itwin.v1 import jobs_pb2, sites_pb2
from itwin.version import API

CONNECT_SECONDS = 15.0  # how long connect() waits for a gateway that is just starting
PAGE = 500


class Version(typing.NamedTuple):
    """Of the gateway."""
    version: str
    api: int
    started: datetime.datetime


class Site(typing.NamedTuple):
    """A cluster. `slots` is 0 where the scheduler decides."""
    name: str
    state: str
    reason: str
    scheduler: str
    slots: int
    slots_in_use: int
    live_jobs: int
    agent_version: str
    host: str
    partitions: tuple = ()
    address: str = ""


def connect(endpoint=None, token=None, ca=None, insecure=False):
    """Connects to a gateway and checks that it answers, is who it should be, and accepts the token.

    endpoint  "host:port"; else ITWIN_ENDPOINT, else `endpoint` in the configuration file
    token     the token, or the path (os.PathLike) of its file; else ITWIN_TOKEN_FILE or ITWIN_TOKEN, else `token_file`
    ca        PEM text or a path; else ITWIN_CA_FILE, else `ca_file`, else the system's certificates
    insecure  without TLS, to this machine only

    The configuration file is $ITWIN_CONFIG or ~/.config/itwin/config.yaml.
    """
    connection = Connection(config.load(endpoint, token, ca, insecure))
    try:
        gateway = Gateway(connection)
        version = gateway.version(patience=CONNECT_SECONDS)
        if version.api != API:
            newer = "this package" if version.api > API else "the gateway"
            raise VersionError(f"the gateway at {connection.endpoint} ({version.version}) speaks contract {version.api}, this "
                               f"package {API}; update {newer}.")
        return gateway
    except BaseException:
        connection.close()
        raise


class Gateway:
    """Made by connect(). Thread-safe; a call waits and repeats for about a minute while the gateway restarts."""

    def __init__(self, connection):
        self._connection = connection

    @property
    def endpoint(self):
        return self._connection.endpoint

    def close(self):
        self._connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __repr__(self):
        return f"<itwin.Gateway {self.endpoint}>"

    # ---- submitting ----------------------------------------------------------------------------------------------

    def submit(self, spec=None, *, name=None, site=None, model=None, loss=None, metrics=None, data=None, target=None,
               split=None, transforms=None, optimizer=None, batch=None, epochs=None, steps=None, ranks=None, nodes=None,
               ranks_per_node=None, time=None, resources=None, seed=None, strategy=None, clip_norm=None, validate_every=None,
               checkpoint=None, scheduler=None, loss_options=None, parameter_groups=None, features=None, env=None, image=None, inputs=None, labels=None, retry=None,
               set=(), check=True, progress=None):
        """Submits a job and returns it, durable, before it starts.

        spec       path of a job.yaml (or .json), its text, or a dict; the keywords are laid over it
        set        ["train.epochs=5", …]: as `itwin submit --set`
        model      torch.nn.Module (scripted, or else exported as a graph, and tried for one step on the first samples unless
                   check=False), path of an archive (.itw) or a TorchScript file, name of a built-in model, or the spec's dict
        loss       mse, l1, cross_entropy, … (docs/models.md lists all), or the torch module or function of that name; none when
                   the module has its own training_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]
        loss_options      {"label_smoothing": 0.1}, {"quantiles": [0.1, 0.5, 0.9]}, …
        data       path, (inputs, targets), {"input": …, "target": …}, torch Dataset, pandas DataFrame with target=, or a dict
        split      {"train": "0..108", "test": "108..132"} or {"test_fraction": 0.2}
        optimizer  torch.optim.Optimizer, {"adam": {"lr": 1e-3}} or a name
        scheduler  torch.optim.lr_scheduler (its numbers count epochs; OneCycleLR's steps), {"cosine": {}} or a name
        parameter_groups  [{"match": ["*.bias"], "weight_decay": 0}]: what differs for some parameters, by name
        features   more fields of the spec's `train`: {"clip_value": 1.0}
        batch      samples per step over all ranks together
        ranks      MPI processes; with nodes, spread over them
        time       wall-time limit of one attempt: "30m", seconds or timedelta
        image      container image to run in, as the site's runtime names it: "/p/images/torch.sif", "docker://…"
        inputs     more files for the working directory: paths, or {name there: path here}

        Raises SpecError (ModelError, DataError, OptimizerError) naming the field and what would be right.
        """
        with tempfile.TemporaryDirectory(prefix="itwin-") as directory:
            train = specs.train(
                directory, model=model, loss=loss, data=data, target=target, split=split, transforms=transforms,
                optimizer=optimizer, check=check, metrics=None if metrics is None else _list(metrics), batch=batch, epochs=epochs,
                steps=steps, seed=seed, strategy=strategy, clip_norm=clip_norm, validate_every=validate_every,
                checkpoint=checkpoint, scheduler=scheduler, options=loss_options, parameter_groups=parameter_groups,
                **(features or {}))
            change = self._common(name, site, env, image, labels, retry,
                                  specs.resources(ranks, nodes, ranks_per_node, time, resources))
            if train:
                change["train"] = train
            if spec is None and not train:
                raise SpecError("nothing to run: give a spec, or at least model= and data=.")
            return self._submit(spec, change, inputs, set, progress)

    def command(self, argv, *, files=(), mpi=False, ranks=None, nodes=None, ranks_per_node=None, time=None, resources=None,
                name=None, site=None, env=None, image=None, inputs=None, labels=None, retry=None, set=(), progress=None):
        """Submits any program: argv runs in the working directory, without a shell; with mpi=True once per rank.

        `files` are uploaded into the working directory under their own names. See docs/worker-contract.md for what the program
        finds in its environment.
        """
        if isinstance(argv, str) or not argv:
            raise SpecError("argv is a list: gw.command(['python3', 'train.py', '--epochs', '5'], files=['train.py']).")
        files = [files] if isinstance(files, (str, os.PathLike)) else files
        command = {"argv": [os.fspath(part) if isinstance(part, os.PathLike) else str(part) for part in argv],
                   "files": [os.fspath(path) for path in files]}
        if mpi:
            command["mpi"] = True
        elif ranks is not None and ranks > 1:
            raise SpecError(f"ranks={ranks} without mpi=True: a program that is not launched by MPI runs once.")
        change = self._common(name, site, env, image, labels, retry,
                              specs.resources(ranks, nodes, ranks_per_node, time, resources))
        change["command"] = command
        return self._submit(None, change, inputs, set, progress)

    def validate(self, spec, set=()):
        """Checks a document as submit() would and returns the spec it means, as a dict. Nothing is stored or uploaded."""
        text, _ = specs.read(spec)
        return json_format.MessageToDict(self._validate(set, document=text).spec, preserving_proto_field_name=True)

    @staticmethod
    def _common(name, site, env, image, labels, retry, resources):
        change = {"name": name, "site": site, "image": image, "retry": retry, "resources": resources or None,
                  "env": None if env is None else {str(k): str(v) for k, v in env.items()},
                  "labels": None if labels is None else {str(k): str(v) for k, v in labels.items()}}
        return {key: value for key, value in change.items() if value is not None}

    def _submit(self, spec, change, inputs, overrides, progress):
        if spec is None:
            base = os.getcwd()
            checked = self._validate(overrides, document=specs.to_text(change))
        else:
            text, base = specs.read(spec)
            overrides = [overrides] if isinstance(overrides, str) else list(overrides)
            checked = self._validate(specs.overrides(change) + overrides, document=text)
        job_spec = checked.spec
        self._attach_files(job_spec, checked.files, base, inputs, progress)
        request = jobs_pb2.SubmitJobRequest(request_id=uuid.uuid4().hex, spec=job_spec)
        response = self._connection.call("Jobs", "SubmitJob", request, "submit the job")
        return Job(self._connection, response.job)

    def _validate(self, overrides, **source):
        overrides = [overrides] if isinstance(overrides, str) else list(overrides)
        request = jobs_pb2.ValidateJobRequest(overrides=overrides, **source)
        return self._connection.call("Jobs", "ValidateJob", request)

    def _attach_files(self, job_spec, references, base, inputs, progress):
        """Uploads every local file that the spec names and lists it under `inputs`, where the spec then points."""
        files = specs.local_files(references, base)
        extra = specs.input_paths(inputs) if inputs else {}
        hashes = artifacts.upload(self._connection, {path: None for _, _, path in files} | {p: None for p in extra.values()},
                                  progress)
        directory = specs.WorkingDirectory(job_spec.inputs)
        for name, path in extra.items():
            directory.add_as(name, hashes[path], path, "inputs")
        for field, value, path in files:
            if field.startswith("command."):
                name = directory.add_as(path.name, hashes[path], path, field)
            else:
                name = directory.add(value, hashes[path], path)
            if name != value:
                specs.set_field(job_spec, field, name)
        job_spec.inputs.extend(directory.added)

    # ---- looking -------------------------------------------------------------------------------------------------

    def job(self, prefix):
        """The job with that id, or the only one whose id begins so (at least 4 characters)."""
        message = self._connection.call("Jobs", "GetJob", jobs_pb2.GetJobRequest(job=str(prefix)), "find the job")
        return Job(self._connection, message)

    def jobs(self, state=None, *, site=None, name=None, labels=None, live=False, limit=50):
        """Jobs, newest first, as a list that a notebook shows as a table (`.to_frame()` for pandas). `name` is a part of it."""
        wanted = [] if state is None else _list(state)
        try:
            numbers = [states.number(text) for text in wanted]
        except ValueError as error:
            raise SpecError(str(error)) from None
        found, token = [], ""
        while len(found) < limit:
            response = self._connection.call("Jobs", "ListJobs", jobs_pb2.ListJobsRequest(
                states=numbers, site=site or "", name_contains=name or "", labels=labels or {}, live_only=live,
                page_size=min(PAGE, limit - len(found)), page_token=token), "list the jobs")
            found += [Job(self._connection, message) for message in response.jobs]
            token = response.next_page_token
            if not token:
                break
        return render.Records(found, render.JOB_COLUMNS)

    def sites(self):
        """The clusters this gateway can run jobs on."""
        response = self._connection.call("Sites", "ListSites", sites_pb2.ListSitesRequest(), "list the sites")
        return render.Records([_site(site) for site in response.sites],
                              {field: (lambda site, field=field: getattr(site, field)) for field in Site._fields})

    def site(self, name):
        """One cluster; NotFound names the nearest name."""
        return _site(self._connection.call("Sites", "GetSite", sites_pb2.GetSiteRequest(name=name), f"look at site {name}"))

    def pause_site(self, name, reason=""):
        """For administrators: no new jobs there; what runs goes on."""
        return _site(self._connection.call("Sites", "PauseSite", sites_pb2.PauseSiteRequest(name=name, reason=reason),
                                           f"pause site {name}"))

    def resume_site(self, name):
        """For administrators: jobs are placed there again."""
        return _site(self._connection.call("Sites", "ResumeSite", sites_pb2.ResumeSiteRequest(name=name), f"resume site {name}"))

    def version(self, patience=60.0):
        """Version and contract of the gateway, and since when it runs."""
        message = self._connection.call("Sites", "GetVersion", sites_pb2.GetVersionRequest(), "connect", patience=patience)
        return Version(message.version, message.api, render.moment(message.started_us))


def _list(value):
    return [value] if isinstance(value, str) else list(value)


def _site(site):
    return Site(site.name, _site_state(site.state), site.reason, site.scheduler, site.slots, site.slots_in_use, site.live_jobs,
                site.agent_version, site.host, tuple(site.partitions), site.address)


def _site_state(value):
    try:
        return sites_pb2.SiteState.Name(value)[len("SITE_STATE_"):]
    except ValueError:
        return f"STATE_{value}"
