"""The probing tasks' files: small ones in the released layouts, and what is wrong with a row."""

import numpy as np
import pytest

from bivec.evaluation.semantic_files import DIMENSIONS, read_tasks


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def write(folder):
    def write(name, *lines):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    return write


@pytest.fixture
def one(folder, write):
    """Writes one file and reads its task."""

    def one(name, *lines, on_error="fail"):
        write(name, *lines)
        (task,) = read_tasks(folder, on_error)
        return task

    return one


def read_words(task):
    return [[text[slice(*span)] for span in spans] for text, spans in zip(task.texts, task.spans, strict=True)]


ASPECT = "Task2_Lexical aspect binary classification/telicity_train.txt"
NORMS = "Task4_Sensorimotor norms/contextualized_sensorimotor_norms_with_ls.txt"
CONCRETENESS = "Task3_CONcreTEXT/CONcreTEXT_test_EN.txt"
NORMS_HEADER = ",".join(["", "word", "sentence", *(f"{name}.M,{name}.SD" for name in DIMENSIONS)])
RATINGS = ",".join(f"{number}.5,1.0" for number in range(11))
CONCRETENESS_HEADER = "testset_idx\tTARGET\tPOS\tINDEX\tTEXT\tAVG"


def test_a_context_probe_is_read_at_five_positions_of_both_files(folder, write):
    for name in ("verb_dynamic", "object_animacy"):
        write(f"Task1/{name}/train.txt", "the horse ate the vase,0", "the god Ate the horse,1")
        write(f"Task1/{name}/test.txt", "the horse ate the god,1", "the horse ate the god,1")
    verbs, objects = read_tasks(folder)
    assert (verbs.name, verbs.kind, objects.name) == ("verb_dynamic", "context", "object_animacy")
    assert read_words(objects)[0] == ["the", "horse", "ate", "the", "vase"]
    assert objects.types.tolist() == ["vase", "horse", "god", "god"]
    assert verbs.types.tolist() == ["ate"] * 4
    assert objects.targets.tolist() == [[0, 1, 1, 1]]
    assert (objects.targets.dtype, objects.num_classes) == (np.int64, 2)
    assert objects.is_test.tolist() == [False, False, True, True]
    assert objects.counts == {"rows that repeat another": 1}


def test_blank_lines_are_no_rows(one):
    task = one(ASPECT, "0\tThe god ate it .\tate\t2\t1", "", "1\tHe slept .\tslept\t1\t0", " ")
    assert task.targets.tolist() == [[1, 0]]


def test_a_verb_is_where_its_index_points_or_nearest_to_it(one):
    task = one(
        ASPECT,
        "0\tthey play or play or play .\tplay\t3\t1",
        "1\tthey  play  or\u2002play or play .\tplay\t4\t0",
        "2\tWas that so .\tWas\t0\t1",
        '3\t" said , "\t,\t2\t1',
    )
    assert task.spans == [[(13, 17)], [(15, 19)], [(0, 3)]]
    assert task.types.tolist() == ["play", "play", "was"]
    assert task.targets.tolist() == [[1, 0, 1]]
    assert task.is_test is None
    assert task.counts == {"words found beside their index": 1, "targets that are no word left out": 1}


def test_concreteness_reads_quoted_texts_and_the_form_in_context(one):
    task = one(
        CONCRETENESS,
        CONCRETENESS_HEADER,
        "1\twin\tV\t2\tYour friend won a prize . \t3.5",
        '2\tdisappoint\tV\t2\t"You will disappoint if you say "" no "" . "\t3.23',
    )
    assert read_words(task) == [["won"], ["disappoint"]]
    assert task.texts[1] == 'You will disappoint if you say " no " . '
    assert task.types.tolist() == ["win", "disappoint"]
    assert task.targets == pytest.approx(np.array([[3.5, 3.23]]))
    assert (task.targets.dtype, task.num_classes) == (np.float32, 0)


def test_the_norms_words_are_found_by_their_beginning_and_by_what_the_sentences_share(one):
    sentences = {
        "act": ["It was a comedic act.", "The actors act."],
        "bank": ["He banked the cash.", "He banked the plane."],
        "run": ["She ran the race.", "She ran the shop."],
        "Break": ["He broke the dish.", "He broke the law."],
    }
    rows = [f"0,{word},{sentence},{RATINGS}" for word, its in sentences.items() for sentence in its]
    task = one(NORMS, NORMS_HEADER, *rows)
    assert [word for (word,) in read_words(task)] == ["act", "act", "banked", "banked", "ran", "ran", "broke", "broke"]
    assert task.types[-1] == "break"
    assert task.targets[:, 0].tolist() == [number + 0.5 for number in range(11)]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("subject_animacy/train.txt", ["the horse ate the vase"], r"train.txt:1: 2 fields are needed"),
        ("subject_animacy/train.txt", ["the horse ate vases,1"], r"train.txt:1: a sentence must have five words"),
        ("subject_animacy/train.txt", ["the horse ate the vase,yes"], r"train.txt:1: the label must be 0 or 1"),
        (ASPECT, ["0\tHe ate .\tate\t1\t1", "1\tHe ate .\tate\t1"], r"telicity_train.txt:2: 5 fields are needed"),
        (ASPECT, ["0\tHe ate .\teat\t1\t1"], r":1: the text does not hold the verb 'eat' as a word"),
        (ASPECT, ["0\tHe ate .\tate\t-1\t1"], r":1: the index must be a whole number from 0 on, got '-1'"),
        (CONCRETENESS, ["testset_idx\tTARGET\tTEXT\tAVG"], r"EN.txt:1: the header must have .*, which INDEX is not"),
        (CONCRETENESS, [CONCRETENESS_HEADER, "1\twin\tV\t3\tHe won .\t3"], r":2: INDEX must be below .* 3, got 3"),
        (CONCRETENESS, [CONCRETENESS_HEADER, "1\twin\tV\t1\tHe won .\tnan"], r":2: AVG must be a number, got 'nan'"),
        (CONCRETENESS, [CONCRETENESS_HEADER, "1\t \tV\t1\tHe won .\t3"], r":2: TARGET is empty"),
        (CONCRETENESS, [CONCRETENESS_HEADER, '1\twin\tV\t1\t"He won .\t3'], r":2: unexpected end of data"),
        (NORMS, [NORMS_HEADER, f"0,act,It was an act.,{RATINGS[:-4]}"], r"with_ls.txt:2: 25 fields are needed"),
        (NORMS, [NORMS_HEADER, f"0,act,It was odd.,{RATINGS}"], r"no word of 'It was odd.' is clearly a form of 'act'"),
        (NORMS, [NORMS_HEADER.replace("Taste.M", "Taste")], r":1: the header must have .*, which Taste.M is not"),
        (NORMS, [], r"the file is empty"),
        (NORMS, [NORMS_HEADER], r"no labelled word stands in it"),
    ],
)
def test_a_bad_row_is_named_with_its_place(folder, write, name, lines, message):
    write(name, *lines)
    if name.startswith("subject"):
        write("subject_animacy/test.txt", "the horse ate the vase,1")
    with pytest.raises(ValueError, match=message):
        read_tasks(folder)


def test_bytes_that_are_no_text_are_named_with_their_line(folder, write):
    write(ASPECT, "0\tHe ate .\tate\t1\t1")
    with (folder / ASPECT).open("ab") as file:
        file.write(b"1\tHe \xff ate .\tate\t2\t1\n")
    with pytest.raises(ValueError, match=r"telicity_train\.txt:2: invalid UTF-8"):
        read_tasks(folder)


def test_bad_rows_are_left_out_on_request_and_counted(one):
    rows = [
        f"0,act,It was an act.,{RATINGS}",
        f"0,act,It was odd.,{RATINGS}",
        "0,act,too few",
        f"1,pen,A pen.,{RATINGS}",
    ]
    task = one(NORMS, NORMS_HEADER, *rows, on_error="skip")
    assert task.types.tolist() == ["act", "pen"]
    assert task.counts == {"bad rows left out": 2}


def test_a_header_is_needed_even_where_bad_rows_are_left_out(one):
    with pytest.raises(ValueError, match=":1: the header must have"):
        one(NORMS, "a,b", f"0,act,It was an act.,{RATINGS}", on_error="skip")


def test_what_is_missing_is_named(folder, write):
    with pytest.raises(FileNotFoundError, match="is no folder; --data is one"):
        read_tasks(folder)
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no probing task in .*: looked for subject_animacy/train.txt"):
        read_tasks(folder)
    write("verb_dynamic/test.txt", "the horse ate the vase,1")
    with pytest.raises(FileNotFoundError, match=r"verb_dynamic has no train.txt in"):
        read_tasks(folder)


def test_a_tasks_own_folder_is_read_and_a_file_in_two_places_refused(folder, write):
    for place in ("", "copy/"):
        write(f"{place}telicity_train.txt", "0\tHe ate .\tate\t1\t1")
    (task,) = read_tasks(folder / "copy")
    assert task.name == "telicity"
    with pytest.raises(ValueError, match=r"are both telicity_train.txt: name the folder of one"):
        read_tasks(folder)


def test_the_released_files_are_read(shared_data):
    released = shared_data / "semantic-probing"
    tasks = {task.name: task for task in read_tasks(released)}
    sizes = {name: (len(task.texts), len(set(task.types))) for name, task in tasks.items()}
    assert sizes == {
        "subject_animacy": (5000, 99),
        "verb_causative": (5000, 100),
        "verb_dynamic": (5000, 78),
        "object_animacy": (5000, 99),
        "telicity": (4935, 2635),
        "duration": (3256, 1188),
        "concreteness": (434, 116),
        "sensorimotor_norms": (448, 112),
    }
