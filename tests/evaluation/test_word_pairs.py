"""Files of scored word pairs: which are read as what, which refused, and how contexts are cut to fit."""

import gzip

import pytest

from bivec import Encoder
from bivec.evaluation.states import Words
from bivec.evaluation.word_pairs import fitted, read_folder

SIMLEX = "word1\tword2\tPOS\tSimLex999\tconc(w1)\nold\tnew\tA\t1.58\t2.72\nsmart\tbright\tA\t9.2\t1.75\n"


def in_context(first="run", second="bank", context1="he <b> ran </b> home", context2="a <b>bank</b>s", mean="2.5"):
    ratings = [str(place) for place in range(10)]
    return "\t".join(["7", first, "v", second, "n", context1, context2, mean, *ratings]) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "old\tnew\t1.58\r\n\r\nsmart\tbright\t9.2\r\n"),
        ("a.txt", "old new 1.58\nsmart   bright 9.2"),
        ("a.tsv", "\ufeffold\tnew\t1.58\nsmart\tbright\t9.2\n"),
        ("a.csv", 'old,new,1.58\n"smart",bright,9.2\n'),
        ("a.csv", "Word 1,Word 2,Human (mean)\nold,new,1.58\nsmart,bright,9.2\n"),
        ("a.csv", "score,word2,id,word1\n1.58,new,7,old\n9.2,bright,8,smart\n"),
        ("a.txt", SIMLEX),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_layouts(tmp_path, name, content, compressed):
    if compressed:
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    else:
        (tmp_path / name).write_bytes(content.encode())
    (pairs,) = read_folder(tmp_path)
    assert (pairs.name, pairs.first, pairs.second) == ("a", ["old", "smart"], ["new", "bright"])
    assert (pairs.gold.tolist(), pairs.contexts, pairs.num_left_out) == ([1.58, 9.2], None, 0)


def test_several_files_are_data_sets_and_notes_are_none(tmp_path):
    (tmp_path / "one.txt").write_text("a b 1\n")
    (tmp_path / "two.csv").write_text("a,b,1\n")
    for name in ("NOTE.md", "README", ".hidden.txt", "picture.png"):
        (tmp_path / name).write_text("What this is.\n")
    (tmp_path / "deeper.txt").mkdir()
    assert [pairs.name for pairs in read_folder(tmp_path)] == ["one", "two"]
    (tmp_path / "one.tsv.gz").write_bytes(gzip.compress(b"a\tb\t1\n"))
    with pytest.raises(ValueError, match=r"one\.tsv\.gz and .*one\.txt are both the data set one"):
        read_folder(tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"old new 1\n" * 50)[:-9])
    with pytest.raises(ValueError, match=r"a\.txt\.gz: the file cannot be read: "):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "What this is.\n", r"a\.txt:1: the score must be a number, got 'is\.'"),
        ("a.txt", "a b 1\nc d\n", r"a\.txt:2: 3 fields are needed .*, got 2"),
        ("a.tsv", "a\tb\t1\n\nc\t\t2\n", r"a\.tsv:3: a word is empty"),
        ("a.csv", 'a,b,1\nc,"d,2\n', r"a\.csv:2: invalid CSV"),
        ("a.txt", "a b nan\n", r"a\.txt:1: the score must be a number, got 'nan'"),
        ("a.txt", "word1 word2 POS mean\n", r"a\.txt:1: the header must name the scores, score or SimLex999"),
        ("a.txt", SIMLEX + "fine\tgood\tA\n", r"a\.txt:4: 5 fields are needed, got 3"),
        ("a.txt", "a b 1\n\udcff d 2\n", r"a\.txt:2: invalid UTF-8"),
        ("a.txt", "", r"a\.txt: the file is empty"),
        ("a.txt", "word1 word2 score\n", r"a\.txt: no pair of words stands in it"),
        ("a.txt", in_context() + in_context(context1="he ran home"), r"a\.txt:2: context 1 must hold one word in <b>"),
        ("a.txt", in_context() + in_context(context2="<b>a</b> <b>b</b>"), r"a\.txt:2: context 2 must hold one"),
        ("a.txt", in_context() + in_context(context2="the <b> </b> end"), r"a\.txt:2: context 2 must hold one"),
        ("a.txt", in_context() + in_context(mean="high"), r"a\.txt:2: the score must be a number, got 'high'"),
        ("a.txt", in_context() + in_context(second=""), r"a\.txt:2: a word is empty"),
        ("a.txt", in_context() + "a\tb\t1\n", r"a\.txt:2: 18 fields between tabs are needed, got 3"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "content", ["a b 1\nc d\ne f 2\n\udcff g 3\n", in_context() + in_context(mean="-") + in_context() + "a\tb\t1\n"]
)
def test_bad_rows_are_left_out_and_counted(tmp_path, content):
    (tmp_path / "a.txt").write_text(content, errors="surrogateescape")
    with pytest.warns(UserWarning, match=r"2 bad rows of .*a\.txt are left out; the first: .*a\.txt:2: "):
        (pairs,) = read_folder(tmp_path, "skip")
    assert (len(pairs.gold), pairs.num_left_out) == (2, 2)


def test_a_file_of_bad_rows_alone_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("What this is.\n")
    with pytest.raises(ValueError, match=r"a\.txt: no pair of words stands in it, first: .*a\.txt:1: the score"):
        read_folder(tmp_path, "skip")


def test_absent_data_says_what_was_looked_for_where(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no word pairs in .*: looked for \*\.txt, \*\.tsv, \*\.csv, also"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        read_folder(tmp_path / "nowhere")


def test_words_in_context_lose_their_marks(tmp_path):
    folder = tmp_path / "scws"
    folder.mkdir()
    (folder / "ratings.txt").write_text(in_context() + in_context(context1="<b> Run </b> !", mean="3"))
    (pairs,) = read_folder(folder)
    assert (pairs.name, pairs.first, pairs.gold.tolist()) == ("scws", ["run", "run"], [2.5, 3.0])
    assert pairs.contexts.texts == ["he ran home", "Run !", "a banks", "a banks"]
    words = [text[slice(*span)] for text, (span,) in zip(*pairs.contexts, strict=True)]
    assert words == ["ran", "Run", "bank", "bank"]


def test_contexts_are_cut_to_the_words_around(tiny_llama_folder):
    """Of 20 tokens one is BOS, and a letter is two with the space before it, which the first has not."""
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=20)
    letters = " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    place = letters.index("M")
    found, num_cut = fitted(
        encoder,
        Words([letters, "a dog", letters, letters], [[(place, place + 1)], [(2, 5)], [(0, 1)], [(50, 51)]]),
    )
    assert num_cut == 3
    assert found.texts == ["I J K L M N O P Q", "a dog", "A B C D E F G H I J", "Q R S T U V W X Y Z"]
    words = [text[slice(*span)] for text, (span,) in zip(*found, strict=True)]
    assert words == ["M", "dog", "A", "Z"]
