"""`transformers serve` with the embedded model on loopback. Used by tests and by `benchmarks/refinement.py`."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from rm.backbone import resolve_model


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Served:
    """One `transformers serve` on loopback that can be killed and started again at the same port.

    ``model`` is what calls name it by: no path, as it becomes part of the judge's name in ledgers and records.
    """

    def __init__(self, log, *options, port=None):
        self.port = port or _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.options = options
        folder = Path(resolve_model("smollm2"))
        self._home, self.model = folder.parent, folder.name
        self.start()

    def start(self):
        command = [str(Path(sys.executable).with_name("transformers")), "serve", self.model]
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu", *self.options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command + options, stdout=log, stderr=log, env=environment, cwd=self._home)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=1):
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-2000:]
                time.sleep(0.5)
        raise AssertionError(f"no server within two minutes: {self.log.read_text()[-2000:]}")

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
