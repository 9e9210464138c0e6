"""What an embedding job is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What to embed, with which model and how; the fields are the options of `bivec embed`.

    `instruction=None` takes the model's own default prompt where it has one, as `Encoder.encode` does.
    """

    inputs: Sequence[str]
    output: str
    model: str
    adapters: Sequence[str] = ()
    text_column: str = "text"
    id_column: str | None = None
    instruction: str | None = None
    pooling: str | None = None
    max_length: int = 512
    normalize: bool = False
    truncate_dim: int | None = None
    precision: Literal["float32", "float16", "int8"] = "float32"
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    workers: int | None = None
    shard: str | None = None
    ray: str | None = None
    limit: int | None = None
    on_error: Literal["fail", "skip"] = "fail"
    resume: bool = False
    overwrite: bool = False
