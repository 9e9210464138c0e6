"""The texts that benchmarks embed: a real mix of lengths, or a synthetic one that needs no data; their token counts.

Both mixes are half single sentences, a quarter paragraphs of several, a quarter short ones, shuffled, and depend on
nothing but the seed (and on the data).
"""

import gzip
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"  # optional; never part of the project
PARAGRAPH_CHARACTERS = (300, 1000)


def open_text(path: Path) -> IO[str]:
    """A text file, which may end in .gz, to be read."""
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file, which may end in .gz."""
    with open_text(Path(path)) as file:
        return file.read().splitlines()


def real_mix(count: int, data: Path = DATA, seed: int = 0) -> list[str]:
    """`count` texts from Wikipedia (sentences, and paragraphs of consecutive ones) and Tatoeba (short sentences).

    Raises FileNotFoundError where `data` does not hold wiki/*.gz (a sentence a line, a blank line between articles)
    and tatoeba/*.gz (a sentence a line).
    """
    wiki, tatoeba = sorted(data.glob("wiki/*.gz")), sorted(data.glob("tatoeba/*.gz"))
    if not wiki or not tatoeba:
        raise FileNotFoundError(f"{data} holds no wiki/*.gz and tatoeba/*.gz: give --texts FILE, or --synthetic")
    articles = [article.splitlines() for article in "\n".join(read_lines(wiki[0])).split("\n\n")]
    short = [line for line in read_lines(tatoeba[0]) if line]
    sentences = [sentence for article in articles for sentence in article]

    def paragraph(rng: random.Random) -> str:
        article = rng.choice(articles)
        # from its first half, so that there is enough left to join
        return _joined(article[rng.randrange((len(article) + 1) // 2) :], rng.randint(*PARAGRAPH_CHARACTERS))

    return _mix(count, seed, lambda rng: rng.choice(sentences), paragraph, lambda rng: rng.choice(short))


def synthetic_mix(count: int, seed: int = 0) -> list[str]:
    """`count` texts of made-up words, drawn like natural ones (rank r with weight 1 / r), in about the same lengths."""
    words_rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(words_rng.choices(syllables, k=words_rng.choice((1, 2, 2, 3, 4)))) for _ in range(5000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def sentence(rng: random.Random, mean_words: float = 20) -> str:
        length = min(80, max(2, round(mean_words * rng.lognormvariate(-0.1, 0.45))))
        return " ".join(rng.choices(words, weights, k=length)).capitalize() + "."

    def paragraph(rng: random.Random) -> str:
        return _joined(iter(lambda: sentence(rng), ""), rng.randint(*PARAGRAPH_CHARACTERS))

    return _mix(count, seed + 1, sentence, paragraph, lambda rng: sentence(rng, mean_words=6))


def token_counts(texts: list[str], tokenizer, max_length: int) -> tuple[np.ndarray, dict]:
    """The number of tokens of each text after truncation, special tokens included, and their distribution."""
    ids = tokenizer(texts, truncation=True, max_length=max_length, padding=False)["input_ids"]
    counts = np.array([len(text_ids) for text_ids in ids])
    p10, p50, p90 = np.percentile(counts, [10, 50, 90])
    facts = {"p10": p10, "p50": p50, "p90": p90, "mean": counts.mean(), "max": counts.max(), "total": counts.sum()}
    return counts, {"texts": len(texts), **{key: float(value) for key, value in facts.items()}}


Draw = Callable[[random.Random], str]


def _mix(count: int, seed: int, sentence: Draw, paragraph: Draw, short: Draw) -> list[str]:
    rng = random.Random(seed)
    texts = [(sentence, paragraph, sentence, short)[i % 4](rng) for i in range(count)]
    rng.shuffle(texts)
    return texts


def _joined(sentences: Iterable[str], characters: int) -> str:
    """The first sentences that fit into so many characters, at least one."""
    text = ""
    for sentence in sentences:
        if text and len(text) + 1 + len(sentence) > characters:
            break
        text = f"{text} {sentence}".strip()
    return text
