import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def stub() -> SimpleNamespace:
    """`StubEncoder`, `vector_of`, and `script`, the file that runs `bivec embed` with them."""
    script = Path(__file__).with_name("stub_embed.py")
    names = runpy.run_path(str(script))
    return SimpleNamespace(StubEncoder=names["StubEncoder"], vector_of=names["vector_of"], script=script)


@pytest.fixture
def start(stub):
    """start(*arguments, pause_at, **environment): `bivec embed` with the stub, stopped in the middle unless 0."""

    def start(*arguments, pause_at: int, **environment: str) -> subprocess.Popen:
        environment = {**os.environ, "PAUSE_AT": str(pause_at), **environment}
        command = [
            sys.executable,
            str(stub.script),
            "embed",
            *map(str, arguments),
            "--model",
            "stub",
            "--device",
            "cpu",
        ]
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
        )
        if pause_at:
            assert process.stdout.readline() == "paused\n", process.communicate()[1]
        return process

    return start


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "in.txt"
    path.write_text("".join(f"text {n}\n" for n in range(50)))
    return path
