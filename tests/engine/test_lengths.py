"""How long texts may be: what is asked for is kept or refused, what is usual is lowered aloud."""

import json

import pytest

from bivec.engine.encoder import Encoder
from bivec.engine.export import export
from bivec.engine.lengths import within_positions


@pytest.mark.parametrize(
    ("asked", "usual", "length", "note"),
    [
        (None, 512, 256, "block_size is 256, not 512: the model has no more positions"),
        (None, 256, 256, None),
        (None, 64, 64, None),
        (None, 10**30, 256, None),  # a tokenizer that names no length
        (256, 512, 256, None),
        (12, 512, 12, None),
        (0, 512, 0, None),
    ],
)
def test_within_positions(asked, usual, length, note):
    assert within_positions(asked, usual, 256, "block_size") == (length, note)


def test_more_than_there_are_positions_is_refused():
    with pytest.raises(ValueError, match="block_size must be at most the model's 256 positions, got 257"):
        within_positions(257, 512, 256, "block_size")


def test_an_encoder_says_that_its_texts_are_cut_sooner_than_usual(tiny_llama_folder, tmp_path, caplog):
    """And a model that is exported so has that length as its own."""
    note = "max_length is 256, not 512: the model has no more positions"
    assert Encoder.from_pretrained(tiny_llama_folder).max_length == 256
    assert caplog.messages == [note]
    Encoder.from_pretrained(tiny_llama_folder, max_length=256)
    assert caplog.messages == [note]
    export(tiny_llama_folder, tmp_path / "out")
    assert caplog.messages == [note] * 2
    assert json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())["max_seq_length"] == 256
    Encoder.from_pretrained(tmp_path / "out")
    assert caplog.messages == [note] * 2
    with pytest.raises(ValueError, match="max_length must be at most the model's 256 positions, got 300"):
        export(tiny_llama_folder, tmp_path / "long", max_length=300)
    assert not (tmp_path / "long").exists()
