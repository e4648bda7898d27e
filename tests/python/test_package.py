"""The package as pip installs it."""

import os
import pathlib
import subprocess
import sys

import pytest


def test_pip_installs_a_package_that_imports_without_optional_parts(tmp_path):
    build = pathlib.Path(os.environ.get("ITWIN_BUILD", pathlib.Path(__file__).parents[2] / "build"))
    package = build / "python-package"
    if not package.exists():
        pytest.skip(f"{package} is not built (target itwin_python_package)")
    copy = tmp_path / "package"  # pip builds inside the directory it is given
    subprocess.run(["cp", "-r", package, copy], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index",
                    "--disable-pip-version-check", "--root-user-action", "ignore", "--target", tmp_path / "site", copy],
                   check=True, timeout=100)
    program = """
import sys
sys.modules.update({name: None for name in ("torch", "pandas", "matplotlib", "ipywidgets", "numpy", "IPython")})
import itwin
from itwin.v1 import spec_pb2
from itwin.errors import MissingPackageError
import itwin.spec, itwin.job
assert spec_pb2.JobSpec(name="x").name == "x"
try:
    itwin.errors.require("pandas", "job.metrics()")
except MissingPackageError as error:
    print(itwin.__file__, error)
"""
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}, cwd=tmp_path,
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout and "job.metrics() needs the Python package 'pandas'" in done.stdout
