"""How many tokens a text is cut to: what is asked for, else what is usual, within the positions that the model has."""

import logging

from .checkpoints import Checkpoint
from .config import ModelConfig
from .json_files import read_object
from .llm2vec import own_llm2vec_length
from .modules import MAX_LENGTH_FILE, MODULES_FILE

logger = logging.getLogger(__name__)

_USUAL = 512
_BEYOND_ANY_MODEL = 10**9  # transformers writes 1e30 where a tokenizer names no length


def within_positions(asked: int | None, usual: int, positions: int, name: str = "max_length") -> tuple[int, str | None]:
    """A length in tokens, and a line to say aloud where it is less than what is usual.

    Args:
        usual: taken where nothing is asked for, or all positions where the model has fewer.
        name: of the setting.
    Raises:
        ValueError: more is asked for than the model has positions.
    """
    if asked is not None and asked > positions:
        raise ValueError(f"{name} must be at most the model's {positions} positions, got {asked}")
    length = min(usual if asked is None else asked, positions)
    lowered = asked is None and length < usual < _BEYOND_ANY_MODEL
    return length, f"{name} is {length}, not {usual}: the model has no more positions" if lowered else None


def text_length(checkpoint: Checkpoint, config: ModelConfig, asked: int | None = None) -> int:
    """Tokens a text is cut to: what is asked for, else the model's own; the log says where positions lower the latter.

    Raises:
        ValueError: more is asked for than the model has positions.
    """
    length, note = within_positions(asked, own_max_length(checkpoint), config.max_position_embeddings)
    if note is not None:
        logger.warning(note)
    return length


def own_max_length(checkpoint: Checkpoint) -> int:
    """Tokens a text is cut to where nobody says: what LLM2Vec's or sentence-transformers' files say, else 512.

    In the latter's layout it is the tokenizer's `model_max_length` where `max_seq_length` does not stand, which may be
    beyond any model.
    """
    length = own_llm2vec_length((checkpoint.base, *checkpoint.adapters)[-1])
    if length is not None:
        return length
    folder = checkpoint.tokenizer
    if (folder / MAX_LENGTH_FILE).is_file() or (folder / MODULES_FILE).is_file():
        for name, key in ((MAX_LENGTH_FILE, "max_seq_length"), ("tokenizer_config.json", "model_max_length")):
            path = folder / name
            found = read_object(path).get(key) if path.is_file() else None
            if isinstance(found, bool) or not isinstance(found, int | None) or (found is not None and found < 1):
                raise ValueError(f"{path}: {key} must be a number of tokens, got {found!r:.80}")
            if found is not None:
                return found
    return _USUAL
