"""In a real Jupyter kernel: the view is a widget, the kernel stays free, errors are one sentence."""

import json
import os
import sys

import nbformat
from nbconvert.preprocessors import ExecutePreprocessor

from fake_gateway import TOKEN


def run_cells(directory, monkeypatch, *sources):
    """Executes the cells in a kernel of this Python; returns their outputs."""
    kernel = directory / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "test",
        "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(directory / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(directory / "ipython"))
    monkeypatch.setenv("MPLCONFIGDIR", str(directory / "matplotlib"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    ExecutePreprocessor(timeout=60, kernel_name="python3", allow_errors=True).preprocess(
        notebook, {"metadata": {"path": str(directory)}})
    return [cell.outputs for cell in notebook.cells]


def test_watch_is_live_and_errors_are_one_sentence(fake, certificates, tmp_path, monkeypatch):
    job = fake.add_job()
    fake.move(job, "RUNNING", progress={"step": 1, "steps": 2})
    fake.emit(job, *(("train/loss", i, 1.0 / (i + 1)) for i in range(9)))
    outputs = run_cells(
        tmp_path, monkeypatch,
        f"import itwin\ngw = itwin.connect({fake.endpoint!r}, {TOKEN!r}, {str(certificates / 'ca.pem')!r})\njob = gw.job('7f3c')",
        "view = job.watch()\nview",
        "job.cancel('the kernel is free'); view.wait(30), job.state",
        "gw.job('ffff')")
    assert not outputs[0], outputs[0]
    assert len(outputs[1]) == 1, outputs[1]
    shown = outputs[1][0]["data"]
    if "application/vnd.jupyter.widget-view+json" not in shown:
        # Replaced in place until the end, by a thread of its own.
        assert "CANCELLED" in shown["text/html"] and "data:image/png;base64" in shown["text/html"]
        assert "the kernel is free" in shown["text/html"]
    assert outputs[2][0]["data"]["text/plain"] == "(True, 'CANCELLED')"
    assert outputs[3][0]["output_type"] == "error"
    assert outputs[3][0]["traceback"] == ["NotFoundError: cannot find the job: no job 'ffff'; `itwin jobs` lists them"]
