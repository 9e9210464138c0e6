"""The LLM2Vec models of McGill-NLP, as data: which adapter stands on which, and how their vectors are made.

No file of theirs says all of it. Bases, order and pooling are those of the repositories' pages, the templates those of
`prepare_for_tokenization` in llm2vec/llm2vec.py, which chooses them by the base's name.
"""

import json
from dataclasses import dataclass
from pathlib import Path

_TABLE = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Recipe:
    """What holds of all models that LLM2Vec makes.

    Attributes:
        owner: who published them.
        stages: each stage and the one whose adapter lies beneath its own, None for the base.
        joint: what stands between instruction and text.
        pooling, pools_special_tokens, pools_prompt: as in `RunDescription`.
    """

    owner: str
    stages: dict[str, str | None]
    pooling: str
    joint: str
    pools_special_tokens: bool
    pools_prompt: bool


RECIPE = Recipe(**_TABLE["common"])
# the base of each stack; its repositories are named after stack and stage
BASES: dict[str, str] = _TABLE["bases"]
# what stands before instruction and text, and after them, by the base
TEMPLATES: dict[str, tuple[str, str]] = {base: (before, after) for base, (before, after) in _TABLE["templates"].items()}


def published_base(name: str) -> str | None:
    """The base of a published repository or a folder of its name, which is given without the owner."""
    return next(
        (base for stack, base in BASES.items() if name in {f"{stack}-{stage}" for stage in RECIPE.stages}), None
    )
