"""Files of tagged words: what each layout gives, and what is said of one that is broken."""

import gzip

import pytest

from bivec.evaluation.tagged_files import read_file, read_folder

CONLL2000 = "He PRP B-NP\nsaid VBD B-VP\n\nIt PRP B-NP\nfell VBD B-VP\n. . O\n"
CONLL2003 = (
    "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n-DOCSTART- -X- O O\n\nPeter NNP I-NP I-PER\n\n"
)
CONLL2002 = "El DA O\nAbogado NC B-PER\n\n"
WNUT17 = "@paul\tO\nNew\tB-location\nYork\tI-location\n\t\nwow\tO\n \t \n\nok\tO"
PARTS = "the DT\ncat NN\n"
CONLLU = (
    "# sent_id = 1\n# text = didn't go\n"
    "1-2\tdidn't\t_\t_\t_\t_\t_\t_\t_\t_\n"
    "1\tdid\tdo\tAUX\tVBD\t_\t3\taux\t_\t_\n"
    "2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_\n"
    "2.1\tgone\tgo\tVERB\tVBN\t_\t_\t_\t0:exroot\t_\n"
    "3\tgo\tgo\tVERB\tVB\t_\t0\troot\t_\t_\n\n"
    "1\tNew York\tNew York\tPROPN\tNNP\t_\t0\troot\t_\t_\n\n"
)


@pytest.fixture
def write(tmp_path):
    def write(content, name="some.test"):
        path = tmp_path / name
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("content", "name", "wanted", "words", "tags"),
    [
        (CONLL2000, "test.txt", "chunking", "He said/It fell .", "B-NP B-VP/B-NP B-VP O"),
        (CONLL2000, "test.txt", "pos", "He said/It fell .", "PRP VBD/PRP VBD ."),
        (CONLL2003, "eng.testb", "chunking", "EU rejects/Peter", "B-NP B-VP/I-NP"),
        (CONLL2003, "eng.testb", "ner", "EU rejects/Peter", "B-ORG O/I-PER"),
        (CONLL2003, "eng.testb", "pos", "EU rejects/Peter", "NNP VBZ/NNP"),
        (CONLL2002, "esp.testb", "ner", "El Abogado", "O B-PER"),
        (CONLL2002, "esp.testb", "pos", "El Abogado", "DA NC"),
        (WNUT17, "test.txt", "ner", "@paul New York/wow/ok", "O B-location I-location/O/O"),
        (PARTS, "test.tsv", "pos", "the cat", "DT NN"),
        (CONLLU, "en-test.conllu", "pos", "did n't go/New_York", "AUX PART VERB/PROPN"),
        ("\ufeff" + CONLL2000.replace("\n", "\r\n"), "test.txt", "pos", "He said/It fell .", "PRP VBD/PRP VBD ."),
    ],
)
def test_every_layout(write, ending, content, name, wanted, words, tags):
    found = read_file(write(content, name + ending), wanted)
    assert [[word.replace(" ", "_") for word in sentence] for sentence in found.words] == [
        sentence.split() for sentence in words.split("/")
    ]
    assert found.tags == [sentence.split() for sentence in tags.split("/")]


def test_an_empty_word_keeps_its_tag(write):
    found = read_file(write("a\tO\n\tB-person\n"), "ner")
    assert (found.words, found.tags) == ([["a", ""]], [["O", "B-person"]])


@pytest.mark.parametrize(
    ("content", "name", "wanted", "message"),
    [
        (CONLL2000 + "\nodd NN\n", "test.txt", "pos", "test.txt:8: 3 columns are needed, as above, got 'odd NN'"),
        (
            CONLL2000 + "\nodd NN X-NP\n",
            "test.txt",
            "chunking",
            "test.txt:8: column 3 must be O or B-, I-",
        ),
        (CONLL2000 + "\nodd B-NP O\n", "test.txt", "pos", "test.txt:8: column 2 must be a POS tag, got 'B-NP'"),
        (WNUT17 + "\nb\tb-person\n", "test.txt", "ner", "test.txt:9: column 2 must be O or B-"),
        (CONLLU + "1\tone\n", "test.conllu", "pos", "test.conllu:11: CoNLL-U has 10 columns with tabs between, got 2"),
        (CONLLU.replace("3\tgo", "4\tgo"), "test.conllu", "pos", "test.conllu:7: the word's ID must be 3, got '4'"),
        (
            CONLLU.replace("AUX", "_"),
            "test.conllu",
            "pos",
            "test.conllu:4: UPOS must be a universal part",
        ),
        (CONLL2000.encode() + b"\nb\xe9 NN B-NP\n", "test.txt", "pos", "test.txt:8: invalid UTF-8"),
    ],
)
def test_a_malformed_sentence_is_named_or_left_out(write, content, name, wanted, message):
    path = write(content, name)
    with pytest.raises(ValueError, match=r"must be|are needed|10 columns|UTF-8") as error:
        read_file(path, wanted)
    assert message in str(error.value)
    found = read_file(path, wanted, "skip")
    assert found.left_out == 1
    assert found.words


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        ("a b c d e\n", "test.txt", "test.txt:1: a line must be a word and 1 to 3 tags"),
        ("", "test.txt", "test.txt: the file is empty"),
        ("\n \n\t\n", "test.txt", "test.txt: no sentence stands in it"),
        ("-DOCSTART- -X- O O\n", "test.txt", "test.txt: no sentence stands in it"),
        ("# a comment\n", "test.conllu", "test.conllu: no sentence stands in it"),
        (CONLL2000.encode("utf-16"), "test.txt", "test.txt: the file is in UTF-16, and must be in UTF-8"),
    ],
)
def test_a_file_without_sentences(write, content, name, message):
    with pytest.raises(ValueError, match=r"test\.") as error:
        read_file(write(content, name), "pos", "skip")
    assert message in str(error.value)


def test_a_torn_gzip_file(write, tmp_path):
    path = write(CONLL2000 * 99, "test.txt.gz")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"test\.txt\.gz: the file cannot be read: "):
        read_file(path, "pos")


def test_a_folder_gives_what_a_task_can_use(write, tmp_path):
    for name in ("eng.train", "eng.testa", "eng.testb.gz"):
        write(CONLL2003, name)
    for name in ("wnut-train.txt", "wnut-valid.txt", "wnut-test.txt"):
        write(WNUT17, name)
    write("notes", "NOTE.md")
    every = {"train", "dev", "test"}
    assert {name: set(parts) for name, parts in read_folder(tmp_path, "ner", every).items()} == {
        "eng": every,
        "wnut": every,
    }
    assert {name: set(parts) for name, parts in read_folder(tmp_path, "pos", {"train"}).items()} == {"eng": {"train"}}


def test_a_folder_without_such_tags(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tagged sentences in .*: looked for train, dev \(valid, testa\)"):
        read_folder(tmp_path, "pos", {"test"})
    write(WNUT17, "wnut-test.txt")
    with pytest.raises(ValueError, match=r"has POS tags: .*wnut-test\.txt has 2 columns with entity tags"):
        read_folder(tmp_path, "pos", {"test"})
    write(PARTS, "wnut-train.txt")
    with pytest.raises(ValueError, match=r"wnut-train\.txt: no entity tags, which the data set's other files have"):
        read_folder(tmp_path, "ner", {"train", "test"})


def test_two_files_of_one_split(write, tmp_path):
    write(CONLL2003, "eng.testa")
    write(CONLL2003, "eng.dev")
    with pytest.raises(ValueError, match="are both the dev split of eng"):
        read_folder(tmp_path, "ner", {"dev"})


def test_only_os_may_be_of_either_kind(write):
    path = write("a\tO\nb\tO\n")
    assert read_file(path, "ner").tags == read_file(path, "chunking").tags == [["O", "O"]]
