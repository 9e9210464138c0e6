"""A way to embed texts that is timed beside others: its vectors' agreement with the reference, and its speed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .timing import Timing

OURS = "bivec"
# of every text's vector with the reference's, seen from the reference's mean: what all texts share must not count
LEAST_COSINE = {"float32": 0.99999, "float16": 0.9999, "bfloat16": 0.995, "int8": 0.99, "float8": 0.99, "q8_0": 0.99}

Encode = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Contender:
    """One way to embed texts, or the reason why it is not there.

    Attributes:
        name: its family's, and a setting of it behind a comma.
        dtype: what its products are computed in; what stands beside them may follow behind a plus.
    """

    name: str
    dtype: str
    encode: Encode | str

    @property
    def family(self) -> str:
        """The name without the setting, of which the fastest is looked for."""
        return self.name.partition(",")[0]

    @property
    def products(self) -> str:
        """A key of `LEAST_COSINE`."""
        return self.dtype.partition("+")[0]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)

    def variant(self, texts: list[str], vectors: dict[str, np.ndarray] | None = None) -> Callable[[], None] | str:
        """What the harness times; the vectors of its last call are left in `vectors`."""
        if isinstance(self.encode, str):
            return self.encode
        encode = self.encode

        def run() -> None:
            result = encode(texts)
            if vectors is not None:
                vectors[self.name] = result

        return run


def centred_cosines(vectors: np.ndarray, reference: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Each text's cosine with the reference's vector of it, both seen from `centre`."""
    a, b = (np.asarray(x, dtype=np.float64) - centre for x in (vectors, reference))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def agreement(entrant: Contender, vectors: np.ndarray | None, reference: np.ndarray | None, control: float | None):
    """Cosines with the reference, and whether they are those of the same vectors.

    Args:
        vectors, reference: `(texts, E)`, the reference of the first texts or of all; None: it did not run.
        control: the cosine that a wrong mask gives.
    Returns:
        a dict: `least_cosine`, `median_cosine` of the vectors that are finite; `num_nan`, the others; `agrees`, None
        where there is nothing to compare; `refused`, why ours may report no speed-up; `note`, the same of a peer, whose
        speed is reported all the same.
    """
    found: dict = {"least_cosine": None, "median_cosine": None, "num_nan": None, "agrees": None, "refused": None}
    if vectors is None:
        return found | {"refused": "did not run"}
    if reference is None or control is None:
        return found | {"refused": "nothing to compare with: the reference in float32 did not run"}
    least = LEAST_COSINE[entrant.products]
    finite = np.isfinite(vectors[: len(reference)]).all(axis=1)
    found["num_nan"] = int((~np.isfinite(vectors).all(axis=1)).sum())
    if finite.any():
        cosines = centred_cosines(vectors[: len(reference)][finite], reference[finite], reference.mean(0))
        found |= {"least_cosine": float(cosines.min()), "median_cosine": float(np.median(cosines))}
    found["agrees"] = not found["num_nan"] and found["least_cosine"] is not None and found["least_cosine"] >= least
    if not found["agrees"]:
        wrong = f"cosine {found['least_cosine'] or 0:.6f}, at least {least} is required"
        wrong += f"; {found['num_nan']} vectors are not finite" if found["num_nan"] else ""
        return found | (
            {"refused": f"vectors disagree: {wrong}"} if entrant.is_ours else {"note": "not the same vectors"}
        )
    if not control < least:
        found["refused"] = f"the check is blind: a causal mask gives cosine {control:.6f}, {least} is required"
    return found


def throughput(timing: Timing, lengths: dict, flops_per_token: int, linear_rate: float | None) -> dict:
    """Texts/s and tokens/s of the median round, and the share of the linears' own best rate that this is."""
    if timing.skipped:
        return {}
    tokens_per_s = lengths["total"] / timing.median
    return {
        "texts_per_s": lengths["texts"] / timing.median,
        "tokens_per_s": tokens_per_s,
        "share_of_linears": tokens_per_s * flops_per_token / linear_rate if linear_rate else None,
    }
