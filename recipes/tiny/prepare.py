"""What the tiny ladder starts from: texts, a tokenizer and an empty Llama's configuration, made from raw text.

    python recipes/tiny/prepare.py --wiki wiki.txt.gz --sentences tatoeba.txt.gz --books gutenberg --output tiny

`--wiki` holds a sentence a line and a blank line between articles, `--sentences` a sentence a line, `--books` plain
wrapped books with blank lines between paragraphs; each may end in .gz. Written are

- `pretrain.txt`: a line an article, a sentence, or a run of paragraphs, in an order drawn once; `held-out.txt`: more;
- `sentences.txt`: a line a sentence, of all three sources, none twice, for MNTP and SimCSE;
- `crops.jsonl`: pairs of crops of the same sentence;
- `model/`: configuration of a Llama of 4.5 million parameters and a lowercasing byte-level BPE of 6,144 tokens.
"""

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

VOCABULARY = 6144
BOS, EOS = "<s>", "</s>"
CHARACTERS_A_LINE = 2000  # of books: about as much as an article
NUM_CROPPED = 150_000  # sentences
HELD_OUT = 400  # lines of pretrain.txt's kind

CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=448,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    intermediate_size=384,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=1,
    architectures=["LlamaForCausalLM"],
)


def read_lines(path: Path) -> list[str]:
    """The lines of a file in UTF-8 or, as some old books are, Latin-1."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return [" ".join(line.split()) for line in text.split("\n")]


def paragraphs(lines: list[str]) -> Iterator[list[str]]:
    """The lines between blank ones."""
    found: list[str] = []
    for line in [*lines, ""]:
        if line:
            found.append(line)
        elif found:
            yield found
            found = []


def book_lines(path: Path) -> Iterator[str]:
    """A book's paragraphs, as many in a line as `CHARACTERS_A_LINE` hold."""
    line = ""
    for paragraph in paragraphs(read_lines(path)):
        line = f"{line} {' '.join(paragraph)}".strip()
        if len(line) >= CHARACTERS_A_LINE:
            yield line
            line = ""
    if line:
        yield line


def book_sentences(line: str) -> list[str]:
    """Sentences of 5 to 80 words, cut after a full stop, a question mark or an exclamation mark."""
    return [s for s in re.split(r"(?<=[.!?])[\"']*\s+", line) if 5 <= len(s.split()) <= 80]


def crop(words: list[str], chance: random.Random) -> str:
    """A run of half to all of the words, at least four, of which a fifth is left out."""
    length = min(len(words), max(4, round(len(words) * chance.uniform(0.5, 1.0))))
    start = chance.randrange(len(words) - length + 1)
    run = words[start : start + length]
    return " ".join([word for word in run if chance.random() > 0.2] or run)


def pairs_of_crops(sentences: list[str]) -> Iterator[dict[str, str]]:
    """Two different crops of each sentence of 6 to 30 words."""
    chance = random.Random(2)
    for sentence in sentences:
        words = sentence.split()
        if 6 <= len(words) <= 30:
            first, second = crop(words, chance), crop(words, chance)
            if first != second:
                yield {"query": first, "positive": second}


def train_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=512)


def prepare(wiki: Path, sentences: Path, books: Path, output: Path) -> None:
    articles = list(paragraphs(read_lines(wiki)))
    short = [line for line in read_lines(sentences) if line]
    book = [line for path in sorted(books.glob("*.txt*")) for line in book_lines(path)]
    lines = [" ".join(article) for article in articles] + short + book
    random.Random(0).shuffle(lines)

    output.mkdir(parents=True, exist_ok=True)
    (output / "pretrain.txt").write_text("".join(f"{line}\n" for line in lines[:-HELD_OUT]), encoding="utf-8")
    (output / "held-out.txt").write_text("".join(f"{line}\n" for line in lines[-HELD_OUT:]), encoding="utf-8")

    held_out = set(lines[-HELD_OUT:])
    single = [s for article in articles if " ".join(article) not in held_out for s in article]
    single += [s for line in book if line not in held_out for s in book_sentences(line)]
    single += [s for s in short if s not in held_out]
    single = list(dict.fromkeys(single))
    random.Random(1).shuffle(single)
    (output / "sentences.txt").write_text("".join(f"{s}\n" for s in single), encoding="utf-8")
    crops = "".join(json.dumps(pair) + "\n" for pair in pairs_of_crops(single[:NUM_CROPPED]))
    (output / "crops.jsonl").write_text(crops, encoding="utf-8")

    train_tokenizer(lines[:-HELD_OUT]).save_pretrained(output / "model")
    CONFIG.save_pretrained(output / "model")
    print(f"{output}: {len(lines):,} lines to pretrain on, {len(single):,} sentences")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("wiki", "sentences", "books", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    prepare(arguments.wiki, arguments.sentences, arguments.books, arguments.output)


if __name__ == "__main__":
    main()
