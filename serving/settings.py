"""What an embedding job is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What to embed, with which model and how; the fields are the options of `bivec embed`.

    `instruction` becomes a prompt as in training: a space follows unless it ends with white space. `None` takes the
    model's own default prompt where it has one, as `Encoder.encode` does. `max_length=None` is the model's own.
    """

    inputs: Sequence[str]
    output: str
    model: str
    adapters: Sequence[str] = ()
    text_column: str = "text"
    id_column: str | None = None
    instruction: str | None = None
    pooling: str | None = None
    max_length: int | None = None
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
