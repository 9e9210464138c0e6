import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def stub() -> SimpleNamespace:
    """`StubEncoder`, `vector_of`, and `script`, the file that runs `bivec embed` with them."""
    script = Path(__file__).with_name("stub_embed.py")
    names = runpy.run_path(str(script))
    return SimpleNamespace(StubEncoder=names["StubEncoder"], vector_of=names["vector_of"], script=script)
