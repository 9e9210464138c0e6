"""Is the mask what we say? A few tokens through the model show it, each time that one is loaded."""

from collections.abc import Sequence

import torch

from .config import ModelConfig, Window
from .packing import PackedBatch
from .runner import Runner

_LENGTH = 8


def check_mask(runner: Runner, config: ModelConfig, windows: Sequence[Window]) -> dict[str, str]:
    """Perturb tokens and see which states change.

    Args:
        windows: one a layer, what the encoder runs with.
    Returns:
        one line a check, for `describe`.
    Raises:
        ValueError: the weights, or eight bits of them, let no token reach another.
        RuntimeError: a future token does not reach an earlier state though the windows show it, it does though they do
            not, or a neighbour does.
    """
    text, changed, place = probe(config, windows)
    length = len(text)

    def early_states(sequences: Sequence[Sequence[int]], windows: Sequence[Window]) -> torch.Tensor:
        return runner(PackedBatch.from_sequences(sequences, device=runner.device), windows)[: length - 1]

    alone = early_states([text], windows)
    if not torch.equal(alone, early_states([text, changed], windows)):
        raise RuntimeError("self-test: a text's states change when another text stands beside it")
    neighbours = {"neighbours": "passed: bitwise the same beside another text"}
    causal = config.causal_windows
    if not torch.equal(early_states([text], causal), early_states([changed], causal)):
        raise RuntimeError("self-test: under the causal window a future token changes an earlier state")
    if place == length - 1:
        return {"causal": "passed: no future token changes an earlier state"} | neighbours
    if torch.equal(alone[place], early_states([changed], windows)[place]):
        other = [(text[0] + 1) % config.vocab_size, *text[1:]]
        drowned = f"one channel of the states drowns the others in {runner.eight_bits}: load the model in a float dtype"
        if torch.equal(alone[1:], early_states([other], windows)[1:]):
            causes = f"the weights are zero, or they overflow{f', or {drowned}' if runner.eight_bits else ''}"
            raise ValueError(f"self-test: no token changes another's state; {causes}")
        if runner.eight_bits:
            raise ValueError(f"self-test: a future token does not change an earlier state; {drowned}")
        raise RuntimeError("self-test: a future token does not change an earlier state, the model is causal")
    return {
        "bidirectional": "passed: a future token changes an earlier state",
        "causal control": "passed: under the causal window it does not",
    } | neighbours


def probe(config: ModelConfig, windows: Sequence[Window]) -> tuple[list[int], list[int], int]:
    """Two texts that differ in their last token, and the first place whose state the windows let that token change."""
    length = min([_LENGTH, *(window + 1 for window in config.sliding_windows if window is not None)])
    text = [(17 * place + 3) % config.vocab_size for place in range(length)]
    changed = [*text[:-1], (text[-1] + 1) % config.vocab_size]
    reach = max((right if right >= 0 else length for _, right in windows), default=length)
    return text, changed, max(0, length - 1 - reach)
