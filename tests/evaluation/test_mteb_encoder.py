"""The encoder for mteb: its instructions, and a small task of one's own where mteb is installed."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from bivec import Encoder
from bivec.evaluation import mteb_encoder
from bivec.evaluation.mteb_encoder import MtebEncoder

QUERY, DOCUMENT = (SimpleNamespace(value=value) for value in ("query", "document"))


@pytest.fixture
def encoder(tiny_llama_folder):
    return Encoder.from_pretrained(tiny_llama_folder, dtype="float32")


@pytest.fixture
def stand_in(monkeypatch):
    """What `MtebEncoder` takes from mteb, so that its own part is tested where mteb is absent."""
    modules = {
        "mteb.models.model_meta": SimpleNamespace(
            ModelMeta=SimpleNamespace(create_empty=lambda values: SimpleNamespace(**values)),
            ScoringFunction=SimpleNamespace(COSINE="cosine"),
        ),
        "mteb.abstasks.abstask": SimpleNamespace(get_abstask_prompt=lambda name: f"Default of {name}."),
    }
    monkeypatch.setattr(mteb_encoder, "needed", lambda module, *_: modules[module])


def metadata(name: str, prompt=None):
    return SimpleNamespace(name=name, prompt=prompt)


@pytest.mark.parametrize(
    ("prompt", "side", "expected"),
    [
        ("Find it", QUERY, "Find it"),
        ("Find it", DOCUMENT, ""),
        ("Find it", None, "Find it"),
        ({"query": "Ask", "document": "Answer"}, QUERY, "Ask"),
        ({"query": "Ask", "document": "Answer"}, DOCUMENT, "Answer"),
        ({"query": "Ask"}, DOCUMENT, ""),
        (None, None, "Default of task."),
        (None, DOCUMENT, ""),
        ("", None, ""),
    ],
)
@pytest.mark.usefixtures("stand_in")
def test_who_gets_which_instruction(encoder, prompt, side, expected):
    assert MtebEncoder(encoder).instruction(metadata("task", prompt), side) == expected
    given = MtebEncoder(encoder, {"task": "Mine"}).instruction(metadata("task", prompt), side)
    assert given == ("" if side is DOCUMENT else "Mine")


@pytest.mark.usefixtures("stand_in")
def test_an_instruction_attends_and_is_not_pooled(encoder):
    ours = MtebEncoder(encoder, {"task": {"query": "Find it:", "document": "Given:"}})
    batches = [{"text": ["the fox", "a dog"]}, {"text": ["many sequences"]}]
    texts = ["the fox", "a dog", "many sequences"]
    for side, instruction in ((QUERY, "Find it: "), (DOCUMENT, "Given: ")):
        found = ours.encode(batches, task_metadata=metadata("task"), hf_split="", hf_subset="", prompt_type=side)
        assert np.array_equal(found, encoder.encode(texts, prompt=instruction))
        assert not np.array_equal(found, encoder.encode(texts))


@pytest.mark.usefixtures("stand_in")
def test_a_corpus_with_empty_titles_and_texts_comes_through(encoder):
    """Rows as mteb joins them: text is title and body."""
    ours = MtebEncoder(encoder, {"task": {"query": "Find it:", "document": "Given:"}})
    batches = [
        {"id": ["0", "1"], "title": [None, "fox"], "body": ["", "jumps"], "text": ["", "fox jumps"]},
        {"id": ["2"], "title": ["fox"], "body": [""], "text": ["fox"]},
    ]
    for side, instruction in ((QUERY, "Find it: "), (DOCUMENT, "Given: ")):
        found = ours.encode(batches, task_metadata=metadata("task"), hf_split="", hf_subset="", prompt_type=side)
        assert not found[0].any()
        assert np.array_equal(found[1:], encoder.encode(["fox jumps", "fox"], prompt=instruction))
    scores = ours.similarity(found, found)
    assert scores[0].tolist() == [0, 0, 0]
    assert scores.isfinite().all()
    assert np.array_equal(ours.similarity_pairwise(found[:1], found[1:2]), [0])


@pytest.mark.usefixtures("stand_in")
def test_another_model_has_another_revision(tiny_llama_folder, adapted, encoder):
    """mteb would take a result that it has kept for one model as another's of the same name."""
    arguments = ({}, {"pooling": "last"}, {"max_length": 9}, {"window": (-1, 0)}, {"adapters": [adapted[0]]})
    encoders = [Encoder.from_pretrained(tiny_llama_folder, dtype="float32", **changes) for changes in arguments]
    revisions = [MtebEncoder(changed).mteb_model_meta.revision for changed in encoders]
    revisions.append(MtebEncoder(encoder, {"task": "Mine"}).mteb_model_meta.revision)
    assert len(set(revisions)) == 6
    assert MtebEncoder(encoder).mteb_model_meta.revision == revisions[0]


def test_a_small_task_in_mteb(encoder):
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install 'bivec[eval]'")
    import datasets
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    first = ["the quick brown fox", "a packed batch", "every token", "lazy dog", "side by side", "many sequences"]
    second = ["the brown fox", "the fox jumps", "each token", "a dog", "sequences", "one"]
    gold = [4.5, 0.5, 4.0, 3.0, 1.0, 2.0]

    class SmallSTS(AbsTaskSTS):
        min_score, max_score = 0, 5
        metadata = TaskMetadata(
            name="BivecSmallSTS",
            description="Six pairs.",
            reference=None,
            dataset={"path": "local/six-pairs", "revision": "1"},
            type="STS",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
            prompt="Find similar text:",
        )

        def load_data(self, **_):
            columns = {"sentence1": first, "sentence2": second, "score": gold}
            self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
            self.data_loaded = True

    result = mteb.evaluate(MtebEncoder(encoder), [SmallSTS()], cache=None)
    (scores,) = result.task_results[0].scores["test"]
    ours, theirs = (encoder.encode(texts, prompt="Find similar text: ") for texts in (first, second))
    cosines = np.diag(encoder.similarity(ours, theirs))
    assert scores["main_score"] == pytest.approx(scipy.stats.spearmanr(gold, cosines).statistic, abs=1e-5)


@pytest.mark.parametrize("empty", [False, True], ids=["texts", "empty-texts"])
def test_a_small_retrieval_task_in_mteb(encoder, empty):
    mteb = pytest.importorskip("mteb", reason="mteb is not installed: pip install 'bivec[eval]'")
    import datasets
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
    from mteb.abstasks.task_metadata import TaskMetadata

    documents = ["the quick brown fox jumps", "a packed batch holds many sequences", "every token sees every token"]
    titles = ["the quick", "", "every"] if empty else [""] * 3
    bodies = [document.removeprefix(title).strip() for document, title in zip(documents, titles, strict=True)]
    nothing = [""] * (2 if empty else 0)

    class SmallRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(
            name="BivecSmallRetrieval",
            description="Three documents, each its own query.",
            reference=None,
            dataset={"path": "local/three-documents", "revision": "1"},
            type="Retrieval",
            category="t2t",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="ndcg_at_10",
            prompt={"query": "Given a question, find it:"} | ({"document": "A document:"} if empty else {}),
        )

        def load_data(self, **_):
            ids = [f"d{place}" for place in range(len(bodies + nothing))]
            corpus = {"id": ids, "title": titles + nothing, "text": bodies + nothing}
            queries = {"id": ["q0", "q1", "q2"], "text": documents}
            split = RetrievalSplitData(
                corpus=datasets.Dataset.from_dict(corpus),
                queries=datasets.Dataset.from_dict(queries),
                relevant_docs={f"q{place}": {f"d{place}": 1} for place in range(3)},
                top_ranked=None,
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    asked = []
    ours = MtebEncoder(encoder)
    plain = encoder.encode
    encoder.encode = lambda texts, **arguments: asked.append(arguments["prompt"]) or plain(texts, **arguments)
    result = mteb.evaluate(ours, [SmallRetrieval()], cache=None)
    assert sorted(asked) == ["A document: " if empty else "", "Given a question, find it: "]
    assert result.task_results[0].scores["test"][0]["recall_at_1"] > 0.3
