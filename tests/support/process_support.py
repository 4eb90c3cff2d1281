"""Ranks that are real processes: a test's own file, run as a script with a rank and a folder."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SUPPORT = str(Path(__file__).parent)  # which pytest puts on the path, for the test; its ranks import the same


@contextlib.contextmanager
def ranks_of(script: str, count: int, folder: Path) -> Iterator[None]:
    """Start them; at the end wait until all have ended well."""
    known = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (SUPPORT, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, script]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=known) for rank in range(count)]
    try:
        yield
        while None in (ended := [process.poll() for process in processes]) and not any(ended):
            time.sleep(0.05)  # one that fails must not leave the others waiting for it
        assert ended == [0] * count
    finally:
        for process in processes:
            process.kill()
