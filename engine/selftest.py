"""Is the mask what we say? A few tokens through the model show it, each time that one is loaded."""

from collections.abc import Sequence

import torch

from .config import ModelConfig, Window
from .packing import PackedBatch
from .runner import Runner

_LENGTH = 8


def check_mask(runner: Runner, config: ModelConfig) -> dict[str, str]:
    """Perturb tokens and see which states change.

    Returns:
        one line a check, for `describe`.
    Raises:
        RuntimeError: a future token does not reach an earlier state, the causal window lets it, or a neighbour does.
    """
    length = min([_LENGTH, *(window + 1 for window in config.sliding_windows if window is not None)])
    text = [(17 * place + 3) % config.vocab_size for place in range(length)]
    changed = [*text[:-1], (text[-1] + 1) % config.vocab_size]

    def first_state(sequences: Sequence[Sequence[int]], windows: Sequence[Window]) -> torch.Tensor:
        return runner(PackedBatch.from_sequences(sequences, device=runner.device), windows)[0]

    bidirectional, causal = config.bidirectional_windows, config.causal_windows
    alone = first_state([text], bidirectional)
    if torch.equal(alone, first_state([changed], bidirectional)):
        raise RuntimeError("self-test: a future token does not change an earlier state, the model is causal")
    if not torch.equal(first_state([text], causal), first_state([changed], causal)):
        raise RuntimeError("self-test: under the causal window a future token changes an earlier state")
    if not torch.equal(alone, first_state([text, changed], bidirectional)):
        raise RuntimeError("self-test: a text's states change when another text stands beside it")
    return {
        "bidirectional": "passed: a future token changes an earlier state",
        "causal control": "passed: under the causal window it does not",
        "neighbours": "passed: bitwise the same beside another text",
    }
