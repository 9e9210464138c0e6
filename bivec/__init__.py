"""bivec: turn a pretrained Llama into a text encoder and run it as fast as the hardware allows."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .engine.encoder import Encoder

__version__ = "0.1.0"
__all__ = ["DEFAULT_MODEL", "Encoder", "__version__"]

# the small encoder that comes with the package; its README.md is its model card
DEFAULT_MODEL = Path(__file__).parent / "engine" / "default_model"


def __getattr__(name: str):
    # torch and transformers take seconds to import; `bivec --help` must not wait for them
    if name == "Encoder":
        from .engine.encoder import Encoder

        return Encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
