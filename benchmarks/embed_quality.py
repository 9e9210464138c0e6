"""What a dtype or a peer does to a trained model: STS-B through the very code that is timed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..evaluation import sts
from ..evaluation.statistics import spearman
from .contender import Contender, centred_cosines
from .timing import error_text


def similarity_scores(
    contenders: Sequence[Contender], data: Path, reference: str, num_pairs: int | None = None
) -> dict[str, dict]:
    """STS-B's dev split in `data` through every contender.

    Args:
        num_pairs: the first so many; default all.
    Returns:
        by its name: `spearman` of its cosines with the scores; `num_nan`, vectors that are not finite, whose cosines
        count as 0; `least_cosine` and `median_cosine` of the others with the vectors of the contender `reference`; or
        `skipped`, the reason. Empty where `data` is no folder.
    """
    if not data.is_dir():
        return {}
    pairs = next(task.pairs for task in sts.read_tasks(data, "dev"))
    sides = pairs.first[:num_pairs], pairs.second[:num_pairs]
    texts = sorted({*sides[0], *sides[1]})
    places = {text: place for place, text in enumerate(texts)}
    first, second = ([places[text] for text in side] for side in sides)
    scores: dict[str, dict] = {}
    vectors: dict[str, np.ndarray] = {}
    for contender in contenders:
        if isinstance(contender.encode, str):
            scores[contender.name] = {"skipped": contender.encode}
            continue
        try:
            found = vectors[contender.name] = np.asarray(contender.encode(texts), dtype=np.float64)
        except Exception as error:  # one that fails stands in the result with its reason
            scores[contender.name] = {"skipped": error_text(error)}
            continue
        finite = np.isfinite(found).all(axis=1)
        similarities = sts.cosines(*(np.where(finite[:, None], found, 0.0)[side] for side in (first, second)))
        scores[contender.name] = {
            "spearman": float(spearman(pairs.scores[:num_pairs], similarities)(np.ones((1, len(first))))[0]),
            "num_nan": int((~finite).sum()),
        }
        if reference in vectors and finite.any():
            truth = vectors[reference]
            cosines = centred_cosines(found[finite], truth[finite], truth.mean(0))
            scores[contender.name] |= {"least_cosine": float(cosines.min()), "median_cosine": float(np.median(cosines))}
    return scores
