"""The notebook from nothing: executed by Jupyter, with a configuration file and a real gateway as all it has."""

import base64
import json
import os
import pathlib
import re
import subprocess
import sys

import nbformat

NOTEBOOK = pathlib.Path(__file__).parents[2] / "client" / "python" / "notebooks" / "first_job.ipynb"


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


def test_it_runs_from_nothing_to_a_better_model(gateway, tmp_path):
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps({
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], "display_name": "test",
        "language": "python"}))
    environment = {**os.environ, "ITWIN_CONFIG": str(gateway.write_config(tmp_path / "config.yaml")),
                   "JUPYTER_PATH": str(tmp_path / "jupyter"), "IPYTHONDIR": str(tmp_path / "ipython"),
                   "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--ExecutePreprocessor.timeout=400",
         "--output-dir", tmp_path, "--output", "executed.ipynb", NOTEBOOK],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:] + gateway.log()

    cells = nbformat.read(tmp_path / "executed.ipynb", as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    ratio = float(re.search(r"m/s: (0\.\d+) of the error is left", text).group(1))
    assert ratio < 0.85
    view = next(cell for cell in cells if cell.source == "job.watch()").outputs[0]["data"]
    assert "application/vnd.jupyter.widget-view+json" in view or (
        "SUCCEEDED" in view["text/html"] and "data:image/png;base64" in view["text/html"])
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 2 and all(len(base64.b64decode(picture)) > 10_000 for picture in pictures)
    assert any("model.pt" in output.get("data", {}).get("text/html", "") for output in outputs)
