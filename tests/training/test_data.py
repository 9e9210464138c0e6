"""Rows of files as tokens: what comes out is what the files hold, and a bad row ends the run before it starts."""

import gzip
import json
import os
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.engine.tokens import TextTokenizer, Tokenized
from bivec.texts.rows import RowError
from bivec.training import data as training_data
from bivec.training.data import PairData, PairRow, TextData, text_groups

few = settings(max_examples=60, derandomize=True, deadline=None)

LONG = "a packed batch holds many sequences side by side and every token sees every other token " * 3


def ids_of(tokenizer, text, prompt="", max_length=16) -> Tokenized:
    """As transformers tokenises them."""
    encoded = tokenizer.hugging_face(prompt + text, truncation=True, max_length=max_length, return_offsets_mapping=True)
    border = len(prompt.removesuffix(" "))
    start = next(i for i, (_, end) in enumerate(encoded["offset_mapping"]) if end > border) if prompt else 0
    whole = tokenizer.hugging_face(prompt + text)["input_ids"]
    return Tokenized(encoded["input_ids"], start, len(whole) > max_length)


def test_texts_of_several_files_in_order_cut_at_max_length(tokenizer, write, tmp_path):
    first = write("a.txt", "one", "", "  ", LONG)
    second = write("b.jsonl", '{"text": "zwölf 😀", "n": 1}')
    pq.write_table(pa.table({"text": ["four", "five"]}), tmp_path / "c.parquet")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"six\n"))
    data = TextData([first, second, str(tmp_path / "c.parquet"), str(tmp_path / "d.txt.gz")], tokenizer)
    texts = ["one", LONG, "zwölf 😀", "four", "five", "six"]
    assert len(data) == 6
    assert data.tokens(range(6)) == [ids_of(tokenizer, text) for text in texts]
    assert data.tokens([5, 1, 5]) == [ids_of(tokenizer, texts[i]) for i in (5, 1, 5)]
    assert len(data.tokens([1])[0].ids) == 16
    assert data.tokens([]) == []


def test_a_text_column_of_any_name(tokenizer, write):
    data = TextData([write("a.csv", "id,body", "1,one", '2,"two, three"')], tokenizer, text_column="body")
    assert data.tokens([0, 1]) == [ids_of(tokenizer, "one"), ids_of(tokenizer, "two, three")]


def test_equal_texts_have_equal_ids(tokenizer, write):
    data = TextData([write("a.txt", "one", "two", "one", "öne"), write("b.txt", "two")], tokenizer)
    first, second, third, fourth, fifth = data.groups(range(5))
    assert (first, second) == (third, fifth)
    assert len({first, second, fourth}) == 3
    assert all(0 <= group < 2**63 for group in (first, second, fourth))


@pytest.mark.parametrize("together", [1, 2, 100])
def test_blocks_are_the_texts_with_bos_joined_and_cut(tokenizer, write, monkeypatch, together):
    monkeypatch.setattr(training_data, "_TOKENIZED_TOGETHER", together)
    files = [write("a.txt", "one", "", LONG), write("b.jsonl", '{"text": ""}', '{"text": " \\n"}', '{"text": "two"}')]
    data = TextData(files, tokenizer, block_size=7)
    joined = [token for text in ("one", LONG, "two") for token in tokenizer.hugging_face(text)["input_ids"]]
    assert len(joined) > 32
    assert joined.count(tokenizer.hugging_face.bos_token_id) == 3
    assert len(data) == len(joined) // 7
    rows = data.tokens(range(len(data)))
    assert [row.ids for row in rows] == [joined[i : i + 7] for i in range(0, len(joined) - 6, 7)]
    assert {row.pool_start for row in rows} == {0}
    assert data.tokens([]) == []
    groups = data.groups(range(len(data)))
    assert len(set(groups)) == len({tuple(row.ids) for row in rows})
    assert all(0 <= group < 2**63 for group in groups)


@pytest.mark.parametrize("block_size", [None, 4])
@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.txt", [], "a.txt: the file is empty"),
        ("a.txt", ["", " "], "a.txt: the file holds no text"),
        ("a.csv", ["text"], "a.csv: the file holds no text"),
        ("a.csv", ["title", "x"], "a.csv: no column 'text'; its columns are 'title'"),
        ("a.jsonl", ['{"body": "x"}'], "a.jsonl: no column 'text'; its columns are 'body'"),
        ("a.jsonl", ['{"text": "x"}', '{"text": 5}'], "a.jsonl:2: the text must be a string, got a number"),
        ("a.jsonl", ['{"text": "x"}', '{"text": null}'], "a.jsonl:2: the text must be a string, got null"),
        ("a.jsonl", ['{"text": "x"}', '{"text": "\\ud800"}'], "a.jsonl:2: the text holds a lone surrogate, U.D800"),
        ("a.jsonl", ['{"text": "x"', "{}"], "a.jsonl:1: invalid JSON"),
        ("a.json", ["x"], "a.json: unknown extension"),
    ],
)
def test_files_that_cannot_be_trained_on_are_named(tokenizer, write, block_size, name, lines, message):
    with pytest.raises(ValueError, match=message):
        TextData([write("good.txt", LONG), write(name, *lines)], tokenizer, block_size=block_size)


def test_an_empty_text_is_an_error_where_a_text_is_a_row(tokenizer, write):
    for text, reason in (("", "empty"), (" \\n", "only whitespace")):
        path = write("a.jsonl", '{"text": "x"}', "", f'{{"text": "{text}"}}')
        with pytest.raises(RowError, match=rf"a\.jsonl:3: the text is {reason}$"):
            TextData([path], tokenizer)


def test_arguments_of_texts_are_checked(tokenizer, write):
    with pytest.raises(ValueError, match="files must name at least one file"):
        TextData([], tokenizer)
    with pytest.raises(FileNotFoundError, match=r"missing\.txt: no such file"):
        TextData(["missing.txt"], tokenizer)
    with pytest.raises(ValueError, match="block_size must be at least 2, got 1"):
        TextData([write("a.txt", LONG)], tokenizer, block_size=1)
    with pytest.raises(ValueError, match=r"block_size must be at most the \d+ tokens of all texts, got 5000"):
        len(TextData([write("a.txt", LONG)], tokenizer, block_size=5000))


def test_a_text_that_leaves_no_token_is_named(tokenizer, write):
    only_bos = TextTokenizer(tokenizer.hugging_face, 2)
    only_bos._backend.enable_truncation(1)  # which no tokenizer is made with
    data = TextData([write("a.txt", "one", "", "two"), write("b.txt", "", "three")], only_bos)
    with pytest.raises(RowError, match=r"b\.txt:2: the text leaves no token of its own \(max_length 2\)"):
        data.tokens([2])
    with pytest.raises(RowError, match=r"a\.txt:3: the text leaves no token"):
        data.tokens([1, 0])


def test_fingerprints_tell_data_apart(tokenizer, write, tmp_path):
    first, second = write("a.txt", "one", LONG), write("b.txt", "two")

    def of(*files, tokenizer=tokenizer, **settings):
        return TextData(files, tokenizer, **settings).fingerprint

    known = of(first, second)
    assert len(known) == 64
    (tmp_path / "moved").mkdir()
    os.link(first, tmp_path / "moved" / "a.txt")
    assert of(str(tmp_path / "moved" / "a.txt"), second) == known
    others = [
        of(second, first),
        of(first),
        of(first, second, text_column="body"),
        of(first, second, block_size=4),
        of(first, second, block_size=5),
        of(first, second, tokenizer=TextTokenizer(tokenizer.hugging_face, 15)),
    ]
    write("b.txt", "twö")
    others.append(of(first, second))
    assert len({known, *others}) == 8


PAIRS = [
    PairRow("what is it", "a fox", ("a dog", "a token"), ""),
    PairRow("where", "over the dog", (), ""),
    PairRow("why", "side by side", ("jumps",), ""),
]


def pair_files(write, tmp_path) -> dict[str, str]:
    """The same rows in every layout."""
    nested = [{"query": row.query, "positive": row.positive, "negatives": list(row.negatives)} for row in PAIRS]
    del nested[1]["negatives"]
    flat = [[row.query, row.positive, *row.negatives, *[""] * (2 - len(row.negatives))] for row in PAIRS]
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "p.parquet")
    columns = dict(zip(("anchor", "positive", "negative_1", "negative_2"), zip(*flat, strict=True), strict=True))
    pq.write_table(
        pa.table({name: [value or None for value in values] for name, values in columns.items()}),
        tmp_path / "flat.parquet",
    )
    return {
        "jsonl": write("a.jsonl", *map(json.dumps, nested)),
        "parquet": str(tmp_path / "p.parquet"),
        "flat parquet": str(tmp_path / "flat.parquet"),
        "anchor": write("a.csv", "id,anchor,positive,negative,negative_2", *(f"7,{','.join(row)}" for row in flat)),
        "query": write(
            "q.csv", "negative_1,query,negative_2,positive", *(",".join([c, a, d, b]) for a, b, c, d in flat)
        ),
        "simcse": write("s.csv", "sent0,sent1,hard_neg,hard_neg_1", *map(",".join, flat)),
        "flat jsonl": write(
            "f.jsonl",
            *(
                json.dumps({"sent0": a, "sent1": b} | ({"hard_neg": c} if c else {}) | {"hard_neg_2": d or None})
                for a, b, c, d in flat
            ),
        ),
    }


def test_every_layout_gives_the_same_rows(tokenizer, write, tmp_path):
    files = pair_files(write, tmp_path)
    data = PairData(list(files.values()), tokenizer)
    assert data.names == tuple(files.values())
    assert data.sizes == (3,) * len(files)
    assert len(data) == 3 * len(files)
    for dataset, layout in enumerate(files):
        assert data.rows(dataset, [2, 0, 1]) == [PAIRS[2], PAIRS[0], PAIRS[1]], layout


def test_queries_have_the_instruction_and_keys_follow_in_row_order(tokenizer, write, tmp_path):
    data = PairData([pair_files(write, tmp_path)["jsonl"]], tokenizer, instruction="find:")
    tokens = data.tokens(0, [2, 0, 1])
    assert tokens.queries == [ids_of(tokenizer, PAIRS[i].query, "find: ") for i in (2, 0, 1)]
    assert all(query.pool_start > 1 for query in tokens.queries)
    keys = ["side by side", "a fox", "over the dog", "jumps", "a dog", "a token"]
    assert tokens.keys == [ids_of(tokenizer, key) for key in keys]
    assert len(set(tokens.groups)) == 6
    assert data.tokens(0, []) == ([], [], [])


def test_a_symmetric_instruction_stands_before_every_text(tokenizer, write, tmp_path):
    path = pair_files(write, tmp_path)["jsonl"]
    data = PairData([path], tokenizer, instruction="say\n", symmetric_instruction=True)
    tokens = data.tokens(0, [0, 1])
    keys = ["a fox", "over the dog", "a dog", "a token"]
    assert tokens.queries == [ids_of(tokenizer, PAIRS[i].query, "say\n") for i in (0, 1)]
    assert tokens.keys == [ids_of(tokenizer, key, "say\n") for key in keys]


def test_a_rows_own_instruction_wins(tokenizer, write):
    rows = [{}, {"instruction": "own"}, {"instruction": ""}, {"instruction": None}]
    jsonl = write("a.jsonl", *(json.dumps({"query": "q", "positive": "p"} | row) for row in rows))
    csv = write("a.csv", "anchor,positive,instruction", "q,p,own", "q,p,")
    data = PairData([jsonl, csv], tokenizer, instruction="default")
    assert [row.instruction for row in data.rows(0, range(4))] == ["default", "own", "", "default"]
    assert [row.instruction for row in data.rows(1, range(2))] == ["own", "default"]
    assert data.tokens(0, [1, 2]).queries == [ids_of(tokenizer, "q", "own "), ids_of(tokenizer, "q")]
    assert [row.instruction for row in PairData([jsonl], tokenizer).rows(0, range(4))] == ["", "own", "", ""]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.csv", [], "a.csv: the file is empty"),
        ("a.csv", ["anchor,positive"], "a.csv: the file holds no row"),
        ("a.csv", ["text", "x"], "a.csv: a row needs the columns query and positive, .*; the file's are 'text'"),
        ("a.csv", ["anchor,sent1", "x,y"], "a row needs the columns .*; the file's are 'anchor', 'sent1'"),
        ("a.csv", ["anchor,positive", "x"], "a.csv:2: 1 fields, but the header has 2"),
        (
            "a.csv",
            ["anchor,positive,negatives", "x,y,z"],
            "a.csv:2: the negatives must be a list of strings, got a str",
        ),
        ("a.csv", ["anchor,positive,negative,negative", "x,y,z,z"], "a.csv: column 'negative' occurs 2 times"),
        ("a.csv", ["sent0,sent1,hard_neg", "x,y,z", ",y,z"], "a.csv:3: the query is empty"),
        ("a.csv", ["sent0,sent1,hard_neg", "x,y, "], "a.csv:2: the negative is only whitespace"),
        ("a.txt", ["x"], "a.txt: a .txt file has no columns, so no positive column 'positive'"),
        ("a.jsonl", ["[]"], "a.jsonl:1: a row must be a JSON object, got list"),
        ("a.jsonl", ['{"query": "x"}'], "a row needs the columns .*; the file's are 'query'"),
        ("a.jsonl", ['{"query": "x", "positive": "y"}', '{"query": "x"}'], "a.jsonl:2: no 'positive' in this row"),
        ("a.jsonl", ['{"query": "x", "positive": " "}'], "a.jsonl:1: the positive is only whitespace"),
        ("a.jsonl", ['{"query": 1, "positive": "y"}'], "a.jsonl:1: the query must be a string, got a number"),
        ("a.jsonl", ['{"query": "x", "positive": "y", "negatives": "z"}'], "a.jsonl:1: the negatives must be a list"),
        (
            "a.jsonl",
            ['{"query": "x", "positive": "y", "negatives": ["z", 3]}'],
            "a.jsonl:1: the negative 2 must be a st",
        ),
        (
            "a.jsonl",
            ['{"query": "x", "positive": "y\\udc00"}'],
            "a.jsonl:1: the positive holds a lone surrogate, U.DC00",
        ),
        (
            "a.jsonl",
            ['{"query": "x", "positive": "y", "instruction": 3}'],
            "a.jsonl:1: the instruction must be a string",
        ),
        ("a.tsv", ["x\ty"], "a.tsv: unknown extension"),
    ],
)
def test_bad_pairs_are_named(tokenizer, write, name, lines, message):
    with pytest.raises(ValueError, match=message):
        PairData([write(name, *lines)], tokenizer)


def test_an_instruction_that_leaves_no_room_is_named_at_once(tokenizer, write):
    rows = [{}, {"instruction": "short"}, {"instruction": LONG}, {"instruction": LONG}]
    path = write("a.jsonl", *(json.dumps({"query": "q", "positive": "p"} | row) for row in rows))
    with pytest.raises(RowError, match=r"a\.jsonl:3: no token of the text is left after the prompt .* max_length 16"):
        PairData([path], tokenizer)
    path = write("b.jsonl", '{"query": "q", "positive": "p"}')
    with pytest.raises(ValueError, match=r"^instruction: no token of the text is left after the prompt"):
        PairData([path], tokenizer, instruction=LONG)
    with pytest.raises(ValueError, match=r"^instruction: the prompt holds a lone surrogate"):
        PairData([path], tokenizer, instruction="a\ud800")


def test_fingerprints_of_pairs_tell_settings_apart(tokenizer, write):
    path = write("a.jsonl", '{"query": "q", "positive": "p"}')
    settings = [{}, {"instruction": ""}, {"instruction": "i"}, {"instruction": "i", "symmetric_instruction": True}]
    found = [PairData([path], tokenizer, **chosen).fingerprint for chosen in settings]
    assert len(set(found)) == 4
    assert PairData([path], tokenizer).fingerprint == found[0]
    assert PairData([path], TextTokenizer(tokenizer.hugging_face, 12)).fingerprint != found[0]


def test_equal_texts_and_positives_of_equal_queries_share_a_group():
    def row(query, positive, *negatives, instruction=""):
        return PairRow(query, positive, negatives, instruction)

    group = text_groups(
        [
            row("q1", "a", "n1", "d"),
            row("q2", "b", "a"),
            row("q1", "c", "n2"),
            row("q3", "c", "e"),  # joins q1 through its positive
            row("q3", "d"),  # and d, a negative of q1
            row("q1", "x", instruction="other"),
            row("q1", "y", "n1", instruction="third"),
        ]
    )
    assert group["a"] == group["c"] == group["d"]
    assert len({group[text] for text in ("a", "b", "e", "n1", "n2", "x", "y")}) == 7


NAMES = st.sampled_from("abcdefg")
ROWS = st.lists(
    st.builds(
        PairRow, st.sampled_from("qrs"), NAMES, st.lists(NAMES, max_size=2).map(tuple), st.sampled_from(["", "i"])
    ),
    max_size=12,
)


@few
@given(ROWS, st.randoms(use_true_random=False))
def test_groups_are_the_components_whatever_the_order(rows, rng: random.Random):
    group = text_groups(rows)
    texts = {text for row in rows for text in (row.positive, *row.negatives)}
    assert set(group) == texts
    # the components, by the plainest algorithm: merge until nothing changes
    label = {text: text for text in texts}
    changed = True
    while changed:
        changed = False
        for first in rows:
            for second in rows:
                if (first.instruction, first.query) == (second.instruction, second.query):
                    old, new = sorted((label[first.positive], label[second.positive]))[::-1]
                    if old != new:
                        changed = True
                        label = {text: new if found == old else found for text, found in label.items()}
    for a in texts:
        for b in texts:
            assert (group[a] == group[b]) == (label[a] == label[b])
    assert all(0 <= found < 2**63 for found in group.values())
    shuffled = list(rows)
    rng.shuffle(shuffled)
    assert text_groups(shuffled) == group


@few
@given(ROWS.filter(len), st.data())
def test_the_shares_of_a_batch_are_the_batch(tokenizer, tmp_path_factory, rows, data):
    path = tmp_path_factory.mktemp("pairs") / "a.jsonl"
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows), encoding="utf-8")
    pairs = PairData([str(path)], tokenizer)
    chosen = data.draw(st.permutations(range(len(rows))))
    whole = pairs.tokens(0, chosen)
    cut = data.draw(st.integers(0, len(rows)))
    shares = [pairs.tokens(0, chosen, share=slice(0, cut)), pairs.tokens(0, chosen, share=slice(cut, None))]
    assert [query for share in shares for query in share.queries] == whole.queries
    counts = [cut, len(rows) - cut]
    for part in ("keys", "groups"):
        values = [getattr(share, part) for share in shares]
        positives = [value for share, count in zip(values, counts, strict=True) for value in share[:count]]
        negatives = [value for share, count in zip(values, counts, strict=True) for value in share[count:]]
        assert positives + negatives == getattr(whole, part)


def test_real_sentences_and_real_triplets(tokenizer, shared_data):
    (wiki,) = shared_data.glob("wiki/*.gz")
    with gzip.open(wiki, "rt", encoding="utf-8") as file:
        lines = [line.rstrip("\n") for line in file]
    texts = [line for line in lines if line]
    data = TextData([str(wiki)], tokenizer)
    assert len(data) == len(texts) == 407_523
    rows = np.linspace(0, len(texts) - 1, 50, dtype=int).tolist()
    assert data.tokens(rows) == [ids_of(tokenizer, texts[row]) for row in rows]

    pairs = PairData([str(shared_data / "nli" / "nli_triplets_mnli_snli_dev.csv")], tokenizer)
    assert pairs.sizes == (5887,)
    assert all(len(row.negatives) == 1 for row in pairs.rows(0, range(5887)))
    # captions repeat, with other hypotheses
    rows = pairs.rows(0, range(5887))
    group = text_groups(rows)
    assert len(group) == len({text for row in rows for text in (row.positive, *row.negatives)}) < 2 * 5887
    assert len(set(group.values())) < len(group)
