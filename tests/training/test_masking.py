"""MNTP's masks: which tokens are chosen, what they become, and where they are read."""

import re

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.engine.packing import PackedBatch
from bivec.engine.tokens import Tokenized, load_tokenizer
from bivec.training.masking import mask_token_id, mask_tokens

few = settings(max_examples=60, derandomize=True, deadline=None)

VOCAB = 50
SPECIAL = frozenset({0, 1, 7, 49, 1000})  # one lies beyond the embeddings
MASK = 9


def mask(sequences, rows=None, **changes):
    arguments = {
        "probability": 0.3,
        "style": "bert",
        "mask_token": MASK,
        "special": SPECIAL,
        "vocab_size": VOCAB,
        "seed": 5,
        "step": 2,
        "rows": range(len(sequences)) if rows is None else rows,
    }
    return mask_tokens([Tokenized(list(ids), 0) for ids in sequences], **(arguments | changes))


SEQUENCES = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), max_size=6)


@few
@given(SEQUENCES, st.sampled_from([0.01, 0.3, 1.0]), st.sampled_from(["bert", "all_mask"]))
def test_only_candidates_are_chosen_and_at_least_one_where_there_is_any(sequences, probability, style):
    masked = mask(sequences, probability=probability, style=style)
    packed = PackedBatch.from_sequences(sequences)
    corrupted = PackedBatch.from_sequences([sequence.ids for sequence in masked.sequences])
    assert corrupted.seqlens == packed.seqlens
    chosen = masked.read_rows + 1
    assert torch.equal(packed.input_ids[chosen], masked.targets)
    candidate = (packed.positions > 0) & ~torch.isin(packed.input_ids, torch.tensor(sorted(SPECIAL)))
    assert candidate[chosen].all()
    assert torch.equal(chosen, chosen.unique())
    if probability == 1:
        assert torch.equal(chosen, candidate.nonzero().flatten())
    untouched = torch.ones(packed.num_tokens, dtype=torch.bool)
    untouched[chosen] = False
    assert torch.equal(corrupted.input_ids[untouched], packed.input_ids[untouched])
    if style == "all_mask":
        assert (corrupted.input_ids[chosen] == MASK).all()
    is_chosen = (~untouched).split(packed.seqlens)
    for of_sequence, candidates in zip(is_chosen, candidate.split(packed.seqlens), strict=True):
        assert of_sequence.any() == candidates.any()


@few
@given(SEQUENCES.filter(len), st.data())
def test_a_sequence_is_masked_alike_alone_and_beside_others(sequences, data):
    rows = [10 * place for place in range(len(sequences))]
    together = mask(sequences, rows)
    order = data.draw(st.permutations(range(len(sequences))))
    shuffled = mask([sequences[i] for i in order], [rows[i] for i in order])
    for place, i in enumerate(order):
        alone = mask([sequences[i]], [rows[i]])
        assert alone.sequences[0] == together.sequences[i] == shuffled.sequences[place]
        start = sum(map(len, sequences[:i]))
        own = (together.read_rows + 1 >= start) & (together.read_rows + 1 < start + len(sequences[i]))
        assert torch.equal(together.read_rows[own] - start, alone.read_rows)
        assert torch.equal(together.targets[own], alone.targets)


def test_seed_step_and_row_each_change_the_mask():
    sequence = [0, *range(10, 48)]
    results = [mask([sequence]), mask([sequence], seed=6), mask([sequence], step=3), mask([sequence], rows=[1])]
    assert len({tuple(result.sequences[0].ids) for result in results}) == 4
    assert mask([sequence]).sequences == results[0].sequences


def test_shares_are_those_of_bert():
    sequences = [[0] + [20] * 400] * 50  # 20,000 candidates
    masked = mask(sequences)
    chosen = masked.read_rows + 1
    became = torch.tensor([token for sequence in masked.sequences for token in sequence.ids])[chosen]
    count = len(chosen)
    assert 0.28 < count / 20_000 < 0.32
    # of the 46 tokens that are not special one is the mask token and one the original
    assert (became == MASK).sum() / count == pytest.approx(0.8 + 0.1 / 46, abs=0.02)
    assert (became == 20).sum() / count == pytest.approx(0.1 + 0.1 / 46, abs=0.015)
    assert set(became.tolist()) == set(range(VOCAB)) - SPECIAL


def test_no_sequence_and_a_sequence_without_a_candidate():
    empty = mask([])
    assert empty.sequences == []
    assert empty.read_rows.shape == empty.targets.shape == (0,)
    nothing = mask([[20], [0, 1, 7]], probability=1.0)
    assert [sequence.ids for sequence in nothing.sequences] == [[20], [0, 1, 7]]
    assert nothing.read_rows.dtype == nothing.targets.dtype == torch.int64
    assert len(nothing.targets) == 0


def test_where_pooling_starts_is_kept():
    (sequence,) = mask_tokens(
        [Tokenized([0, 20, 21], 2)],
        probability=0.5,
        style="all_mask",
        mask_token=MASK,
        special=SPECIAL,
        vocab_size=VOCAB,
        seed=0,
        step=0,
        rows=[0],
    ).sequences
    assert sequence.pool_start == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probability": 0.0}, "probability must be above 0 and at most 1, got 0.0"),
        ({"probability": 1.5}, "probability must be above 0 and at most 1, got 1.5"),
        ({"style": "roberta"}, "style must be one of bert, all_mask, got 'roberta'"),
        ({"mask_token": VOCAB}, "mask_token must be from 0 to 49, got 50"),
        ({"rows": [1, 2]}, r"rows must name one row a sequence \(1\), got 2"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        mask([[0, 20, 21]], **changes)


def test_mask_token_of_a_tokenizer(tokenizer):
    hugging_face = tokenizer.hugging_face
    assert mask_token_id(hugging_face) == hugging_face.convert_tokens_to_ids("_")
    assert mask_token_id(hugging_face, "</s>") == hugging_face.eos_token_id
    with pytest.raises(ValueError, match="must be one item of the tokenizer's vocabulary, got '<mask>'") as error:
        mask_token_id(hugging_face, "<mask>")
    proposed = re.search("as '(.*)'$", str(error.value))[1]
    assert mask_token_id(hugging_face, proposed) not in hugging_face.all_special_ids


def test_an_unknown_mask_token_is_not_taken_for_the_unknown_token(make_checkpoint, tmp_path):
    hugging_face = load_tokenizer(make_checkpoint(tmp_path / "model"), 1000)
    hugging_face.unk_token = "</s>"
    assert hugging_face.convert_tokens_to_ids("<mask>") == hugging_face.eos_token_id
    with pytest.raises(ValueError, match="got '<mask>'"):
        mask_token_id(hugging_face, "<mask>")


def test_a_blank_that_a_vocabulary_has_as_a_byte_alone():
    vocabulary = {"<unk>": 0, "<0x5E>": 1, "<0x5F>": 2, "a": 3}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    hugging_face = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>")
    assert mask_token_id(hugging_face) == 2
    assert mask_token_id(hugging_face, "a") == 3
    with pytest.raises(ValueError, match=r"got '%': pass .* as 'a'"):
        mask_token_id(hugging_face, "%")


def test_a_real_vocabulary_without_a_blank(shared_data):
    hugging_face = load_tokenizer(shared_data / "stories260K" / "hf", 512)
    assert mask_token_id(hugging_face) == mask_token_id(hugging_face, "<0x5F>") == 3 + 0x5F
