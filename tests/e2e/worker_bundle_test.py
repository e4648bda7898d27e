"""The worker as one file for sites without LibTorch: it starts from any directory with its own libraries."""
import json
import os
import subprocess
import tarfile

import pytest

from harness import BIN, SOURCE

GLIBC = ("linux-vdso", "ld-linux", "libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so", "libmvec.so", "libresolv.so",
         "libutil.so", "libanl.so")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bundle")
    output = directory / "worker.tar.gz"
    subprocess.run([SOURCE / "deploy" / "make-worker-bundle.sh", "--fast", "--worker", BIN / "itwin-worker", "--output", output],
                   check=True, stdout=subprocess.DEVNULL, timeout=300)
    operators = json.loads((directory / "worker.tar.gz.operators.json").read_text())
    assert "aten::linear" in operators["operators"] and operators["libtorch"]
    elsewhere = directory / "some where else"
    with tarfile.open(output) as archive:
        archive.extractall(elsewhere)
    return elsewhere


def environment(**more):
    return {"PATH": "/usr/bin:/bin", "HOME": "/", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **more}


def test_it_starts_from_another_directory(bundle, tmp_path):
    link = tmp_path / "itwin-worker"  # as a release names it
    link.symlink_to(bundle / "itwin-worker")
    result = subprocess.run([link, "--self-test"], env=environment(), cwd="/", capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ranks 1 on 1 node" in result.stdout and "LibTorch" in result.stdout


def test_all_libraries_but_glibc_are_its_own(bundle):
    listed = subprocess.run(["ldd", bundle / "bin" / "itwin-worker"], capture_output=True, text=True, check=True,
                            env=environment(LD_LIBRARY_PATH=str(bundle / "lib"))).stdout
    foreign = [line.strip() for line in listed.splitlines()
               if str(bundle) not in line and not line.strip().startswith(GLIBC) and "ld-linux" not in line]
    assert not foreign, foreign
    assert any("libtorch" in line for line in listed.splitlines())


def test_the_site_may_keep_its_own_mpi(tmp_path):
    output = tmp_path / "worker.tar.gz"
    subprocess.run([SOURCE / "deploy" / "make-worker-bundle.sh", "--fast", "--site-mpi", "--worker", BIN / "itwin-worker",
                    "--output", output], check=True, stdout=subprocess.DEVNULL, timeout=300)
    with tarfile.open(output) as archive:
        names = archive.getnames()
    assert not [name for name in names if "libmpi" in name or "openmpi" in name]
    assert [name for name in names if "libtorch" in name]
    assert os.path.getsize(output) > 1 << 20
