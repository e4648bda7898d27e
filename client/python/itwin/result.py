"""What a job left: final metrics, files, the trained model."""

import pathlib
import tempfile
import typing

from itwin import artifacts, render, safetensors
from itwin import optimizer as optimizers
from itwin.errors import DamagedError, ModelError, NotFoundError, first_of, require
from itwin.v1 import jobs_pb2

WEIGHTS = "weights.safetensors"
MODEL = "model.pt"
OPTIMIZER = "optimizer.safetensors"


class OutputFile(typing.NamedTuple):
    """An output of the job, named by its content."""
    path: str
    sha256: str
    size_bytes: int


class Result:
    """Made by Job.result(). Files come when they are asked for, and are checked against the SHA-256 that the job recorded."""

    def __init__(self, connection, job):
        self._connection = connection
        self._job = job
        self._scratch = None
        response = connection.call("Jobs", "ListOutputs", jobs_pb2.ListOutputsRequest(job=job.id), "list the outputs")
        self.files = render.Records(
            [OutputFile(output.path, output.sha256, output.size_bytes) for output in response.outputs],
            {"path": lambda file: file.path, "size_bytes": lambda file: file.size_bytes, "sha256": lambda file: file.sha256})

    @property
    def metrics(self):
        """The final metrics, such as {"test/rmse": 0.2269}."""
        return self._job.summary

    def __repr__(self):
        return f"<itwin.Result of {self._job.id[:8]}: {len(self.files)} files, {self.metrics}>"

    def _repr_html_(self):
        return render.job_html(self._job.message) + self.files._repr_html_()

    def download(self, directory=".", files=None, progress=None):
        """Puts the outputs (or those whose paths are given) below `directory`; returns their paths.

        A file gets its name only when it is whole and its SHA-256 fits; what is there already is not fetched again, and a broken-off
        transfer goes on where it stopped.
        """
        wanted = list(self.files) if files is None else [self._file(path) for path in ([files] if isinstance(files, str) else files)]
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
        return [artifacts.download(self._connection, file, directory, progress) for file in wanted]

    def load(self, module, optimizer=None):
        """Loads the trained weights into the module that was handed over (or one of the same shape), and returns it.

        With `optimizer`, a torch optimizer of the module's parameters (or several by the names of the job's phases), its state too,
        to go on training here; the job needs checkpoint={"export_optimizer": True}. All names and shapes are compared before anything
        is changed; ModelError and OptimizerError list what does not fit.
        """
        torch = require("torch", "result.load()")
        if isinstance(module, type) or not isinstance(module, torch.nn.Module):
            raise ModelError(f"load() takes the module to fill, not {module!r}; for the model alone use result.model().")
        weights = safetensors.read(self._local(WEIGHTS)) if self._has(WEIGHTS) else {}
        expected = module.state_dict()
        if (not weights or expected.keys() - weights.keys()) and self._has(MODEL):
            # Weights that are tied, or written by another program, may be complete only in the model.
            weights = {**self.model().state_dict(), **weights}
        if not weights:
            raise NotFoundError(f"the job left no {WEIGHTS} and no {MODEL}; its files: {self._names()}.")
        problems = []
        for name, tensor in expected.items():
            if name not in weights:
                problems.append(f"{name} is missing in the result")
            elif tuple(weights[name].shape) != tuple(tensor.shape):
                problems.append(f"{name} is {tuple(weights[name].shape)} in the result, {tuple(tensor.shape)} in the module")
        problems += [f"{name} is not in the module" for name in weights if name not in expected]
        if problems:
            raise ModelError(f"the weights do not fit the module: {first_of(problems)}. Make the module as it was when it was "
                             "submitted. Nothing was changed.")
        states = self._optimizer_states(module, optimizer)
        module.load_state_dict({name: weights[name] for name in expected})
        for target, state in states:
            target.load_state_dict(state)
        return module

    def _optimizer_states(self, module, optimizer):
        if optimizer is None:
            return []
        if not self._has(OPTIMIZER):
            raise NotFoundError(f"the job left no {OPTIMIZER}: submit with checkpoint={{'export_optimizer': True}} to get it.")
        tensors = safetensors.read(self._local(OPTIMIZER))
        by_phase = optimizer if isinstance(optimizer, dict) else {None: optimizer}
        return [(target, optimizers.trained_state(target, module, tensors, phase)) for phase, target in by_phase.items()]

    def model(self, map_location="cpu"):
        """The trained model as TorchScript, in evaluation mode: usable without the class it was made from."""
        torch = require("torch", "result.model()")
        path = self._local(MODEL)
        try:
            return torch.jit.load(str(path), map_location=map_location).eval()
        except RuntimeError as error:
            raise DamagedError(f"{MODEL} is not TorchScript that this torch ({torch.__version__}) can load: "
                               f"{str(error).splitlines()[0]}. The weights alone: result.load(module).") from None

    def _has(self, path):
        return any(file.path == path for file in self.files)

    def _names(self):
        return ", ".join(file.path for file in self.files[:10]) or "none"

    def _file(self, path):
        for file in self.files:
            if file.path == str(path):
                return file
        raise NotFoundError(f"the job left no '{path}'; its files: {self._names()}.")

    def _local(self, path):
        """A checked copy that lives as long as this object."""
        file = self._file(path)
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="itwin-result-")
        return artifacts.download(self._connection, file, self._scratch.name)
