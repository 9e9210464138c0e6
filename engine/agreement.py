"""How near the vectors of a dtype are to float32's, on sentences that come with bivec: what a dtype costs a model.

The model is loaded a second time, in float32, once the first has given back its memory.
"""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .description import Described
from .memory import free_memory

# of a word to a paragraph, on unlike subjects, with numbers, marks and other scripts
SENTENCES = (
    "Rain.",
    "Where is the nearest pharmacy?",
    "A man is slicing an onion in the kitchen.",
    "Two children kick a red ball across the yard.",
    "The committee rejected the proposal by 7 votes to 5.",
    "Her flight leaves at 06:45 on 12 March and costs $318.20.",
    "Water boils at 100 °C, or 212 °F, at sea level; on a mountain it boils sooner.",
    "I would not recommend this film to anyone, although the music is lovely.",
    "NOTICE: the lift is OUT OF ORDER until further notice!!!",
    "def area(radius): return 3.14159 * radius ** 2",
    "https://example.org/articles?id=4711&lang=en#results",
    "“Never again,” she said (and meant it); then: silence …",
    "Der Zug nach München hat heute etwa vierzig Minuten Verspätung.",
    "El gato duerme en el tejado desde las tres de la tarde.",
    "La bibliothèque ferme à dix-huit heures, sauf le jeudi.",
    "今天的会议改到下午三点。",
    "Мы приехали слишком поздно, и музей уже закрылся.",
    "so tired today lol 😀 cant wait for the weekend",
    "Cells divide, copy their genetic material and repair it, and most errors are corrected before they are inherited.",
    "The defendant shall pay the amount named in section 4 (b) within thirty days of the date on which this judgment "
    "becomes final, together with interest at a yearly rate of 3.5 per cent.",
    "Mix 250 g of flour with 150 ml of milk, two eggs and a pinch of salt. Let the batter rest for half an hour, heat "
    "some butter in a pan, and bake thin pancakes, turning each of them once. They are best while they are still warm.",
    "In the second quarter the company sold 14,200 bicycles, 9 % more than a year before, while its profit fell from "
    "2.1 to 1.6 million euros. The board blames the price of steel and a fire in one of its two warehouses, which held "
    "up deliveries for almost three weeks. It expects the rest of the year to be better and keeps its dividend.",
    "When the lighthouse keeper climbed the stairs that evening, he counted the steps as he had done each evening for "
    "thirty years, and for the first time there was one too many. He went down and counted again. Then he sat on the "
    "lowest of them, listened to the sea, and tried to remember whether anybody had ever told him the right number, or "
    "whether he had only ever believed the first one that he had found.",
    "The sensor reports temperature, humidity and pressure every ten seconds. Readings that differ from the median of "
    "the last minute by more than four deviations are marked, not removed, so that whoever analyses them later can "
    "decide. A fault in the cable shows as a run of equal values; a fault in the clock shows as two readings with one "
    "time stamp. Neither is repaired by the device itself: the log is written once, in order, and never changed.",
)


class Sample(NamedTuple):
    """Vectors `(N, dim)` of `SENTENCES`, and why one has none."""

    vectors: np.ndarray
    reasons: list[str | None]


class Samples(Described, Protocol):
    """The part of `Encoder` that is compared."""

    def encode_rows(self, texts: tuple[str, ...]) -> tuple[np.ndarray, list[str | None], int]: ...

    def describe(self) -> dict[str, Any]: ...


def describe_with_cost(
    load: Callable[..., Samples], *, dtype: str, attention: str, max_length: int | None
) -> dict[str, Any]:
    """What `Encoder.describe` says, with the cosines to float32 in its part "backend" where the dtype is another.

    Args:
        load: `load(dtype=, attention=, max_length=)` gives the encoder.
    """
    encoder = load(dtype=dtype, attention=attention, max_length=max_length)
    description = encoder.describe()
    if encoder.compute_dtype.name == "float32":
        return description
    found = sample(encoder)
    max_length, device = encoder.max_length, encoder.device
    # the weights and, beside them, what they are packed into
    needed = 2 * 4 * sum(parameter.numel() for parameter in encoder.model.parameters())
    del encoder
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of it counts as taken
    free = free_memory(device)
    if needed > free:
        cost = f"not measured: float32 takes up to {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        description["backend"]["cosine with float32"] = cost
    else:
        # not every attention takes float32
        exact = sample(load(dtype="float32", attention="auto", max_length=max_length))
        description["backend"] |= describe_cosines(found, exact)
    return description


def sample(encoder: Samples) -> Sample:
    vectors, reasons, _ = encoder.encode_rows(SENTENCES)
    return Sample(vectors, reasons)


def describe_cosines(found: Sample, exact: Sample) -> dict[str, str]:
    """The least and the median cosine, as they are and seen from float32's mean: what all vectors share hides much."""
    rows = [row for row, reasons in enumerate(zip(found.reasons, exact.reasons, strict=True)) if not any(reasons)]
    absent = [reason for reason in found.reasons if reason is not None]
    note = f"; {len(absent)} have no vector: {absent[0]}" if absent else ""
    if len(rows) < 2:
        return {"cosine with float32": f"not measured{note}"}
    plain, centred = cosines(found.vectors[rows], exact.vectors[rows])
    return {
        "cosine with float32": f"{_least_and_median(plain)} ({len(rows)} built-in sentences){note}",
        "the same, centred": _least_and_median(centred),
    }


def cosines(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines float64 `(N,)` of the rows `(N, dim)` of both, as they are and seen from the mean of `theirs`."""
    ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
    centre = theirs.mean(axis=0)
    return _cosines(ours, theirs), _cosines(ours - centre, theirs - centre)


def _cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    products = (ours * theirs).sum(axis=1)
    return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)


def _least_and_median(cosines: np.ndarray) -> str:
    return f"least {cosines.min():.4f}, median {np.median(cosines):.4f}"
