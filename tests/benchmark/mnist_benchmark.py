#!/usr/bin/env python3
"""The MNIST example as a user runs it: a gateway with its embedded site, `itwin submit deploy/examples/mnist/job.yaml`.
Prints the test accuracy, in percent, and the seconds from submit to success. ITWIN_BIN and ITWIN_SOURCE as for the others."""
import json
import os
import subprocess
import sys
import tempfile
import time

from figures import figure

AIM_PERCENT = 98.9

bin_folder = os.environ["ITWIN_BIN"]
examples = os.path.join(os.environ["ITWIN_SOURCE"], "deploy/examples/mnist")


def run(*argv, **options):
    return subprocess.run(argv, check=True, capture_output=True, text=True, **options).stdout


def main():
    run(os.path.join(examples, "fetch.sh"))
    with tempfile.TemporaryDirectory() as data:
        gateway = os.path.join(bin_folder, "itwin-gateway")
        itwin = os.path.join(bin_folder, "itwin")
        run(gateway, "init", "--data", data)
        os.environ["ITWIN_CONFIG"] = os.path.join(data, "client/config.yaml")
        with open(os.path.join(data, "gateway.log"), "w") as log:
            server = subprocess.Popen([gateway, "serve", "--data", data, "--listen", "127.0.0.1:0", "--slots", "2"],
                                      stdout=log, stderr=log)
        try:
            while not os.path.exists(os.path.join(data, "run/endpoint")):
                if server.poll() is not None:
                    sys.exit(open(os.path.join(data, "gateway.log")).read())
                time.sleep(0.02)
            start = time.monotonic()
            job = json.loads(run(itwin, "submit", os.path.join(examples, "job.yaml"), "--output", "json"))
            watched = subprocess.run([itwin, "watch", job["id"]], capture_output=True, text=True)
            seconds = time.monotonic() - start
            shown = json.loads(run(itwin, "status", job["id"], "--output", "json"))
            if shown["state"] != "SUCCEEDED":
                sys.exit(f"job {job['id']} is {shown['state']}: {shown.get('reason', '')}\n{watched.stdout}{watched.stderr}")
            figure("mnist_test_accuracy", 100 * shown["summary"]["test/accuracy"], "%", AIM_PERCENT)
            figure("mnist_submit_to_success", seconds, "s")
        finally:
            server.terminate()
            server.wait()
            subprocess.run([os.path.join(bin_folder, "itwin-agent"), "stop", "--root", os.path.join(data, "sites/local"),
                            "--kill-jobs"], capture_output=True)


main()
