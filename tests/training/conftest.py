import pytest

from bivec.engine.tokens import TextTokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(make_checkpoint, tmp_path_factory) -> TextTokenizer:
    """A byte-level BPE that puts BOS first and cuts a text at 16 tokens."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tokenizer"))
    return TextTokenizer(load_tokenizer(folder, 1000), 16)


@pytest.fixture
def write(tmp_path):
    """write(name, lines) -> path, as a string, of a file that holds the lines."""

    def write(name: str, *lines: str) -> str:
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write
