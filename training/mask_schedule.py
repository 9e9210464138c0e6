"""How the causal mask goes while a model is trained: which window each layer has at a step, and how much it shows.

`bidirectional` is LLM2Vec's (arXiv 2404.05961), at once. `annealed` shows each future token with a chance that grows
linearly, as DiffuLLaMA does (arXiv 2410.17891); `window` lets the look-ahead grow linearly up to the longest text;
`layers` frees one layer after the other from the last one down, as Dukić and Šnajder do (arXiv 2401.14556).
"""

from typing import NamedTuple

from ..engine.config import BIDIRECTIONAL, CAUSAL, ModelConfig, Window


class MaskNow(NamedTuple):
    """The mask of one step: a window a layer, and the chance that a future token within it is seen."""

    windows: tuple[Window, ...]
    future_p: float = 1.0


class MaskSchedule:
    """The mask of every step of a run.

    Args:
        kind: bidirectional, causal, window, annealed or layers.
        num_steps: steps until everything is seen; the last of them already sees it.
        max_length: tokens of the longest text, where the growing window ends.
    """

    def __init__(self, kind: str, num_steps: int, max_length: int, config: ModelConfig):
        self.kind = kind
        self.num_steps = num_steps
        self.max_length = max_length
        self.config = config

    def __call__(self, step: int) -> MaskNow:
        """The mask of step `step`, counted from 0."""
        progress = min(1.0, (step + 1) / self.num_steps)
        everything = self.config.windows(BIDIRECTIONAL)
        causal = self.config.windows(CAUSAL)
        if self.kind == "causal":
            return MaskNow(causal)
        if self.kind == "bidirectional" or progress == 1.0:
            return MaskNow(everything)
        if self.kind == "annealed":
            return MaskNow(everything, progress)
        if self.kind == "window":
            return MaskNow(self.config.windows((-1, round(progress * self.max_length))))
        num_causal = len(causal) - round(progress * len(causal))
        return MaskNow(causal[:num_causal] + everything[num_causal:])

    @property
    def final_window(self) -> Window:
        """What the trained model is for."""
        return CAUSAL if self.kind == "causal" else BIDIRECTIONAL
