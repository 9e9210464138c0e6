"""Probing for meaning: what is known by construction is found, what is random is not, and what a position can know."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from bivec import cli
from bivec.engine.config import BIDIRECTIONAL, CAUSAL
from bivec.engine.encoder import Encoder
from bivec.evaluation.probes import TEST, TRAIN
from bivec.evaluation.report import Report, statistic_of
from bivec.evaluation.semantic import Probing, planned
from bivec.evaluation.semantic_files import DIMENSIONS, SemanticTask, read_tasks
from bivec.evaluation.states import Words, word_states

NUM_ITEMS = 200


@pytest.fixture
def make_task():
    """make_task(kind): 200 items of 50 word types, with classes or ratings; of a context probe a quarter is tested."""

    def make(kind):
        generator = np.random.default_rng(0)
        num_classes = 2 if kind in ("context", "aspect") else 0
        owner = np.arange(NUM_ITEMS) % 50
        rows = 11 if kind == "norms" else 1
        if num_classes:
            targets = (owner[None] % 2).astype(np.int64)
        else:
            targets = generator.uniform(1, 7, size=(rows, NUM_ITEMS)).astype(np.float32)
        is_test = owner >= 38 if kind == "context" else None
        types = np.array([f"word{number}" for number in owner])
        spans = [[(0, 1)]] * NUM_ITEMS
        return SemanticTask(kind, kind, ["w"] * NUM_ITEMS, spans, types, targets, num_classes, is_test, {})

    return make


def probed(task, states, protocol="bivec", seeds=2):
    """Scores by system, probe and metric."""
    probing = Probing(task, planned(task, protocol, seeds), task.name)
    probing.read(("model", "shuffled labels"), torch.from_numpy(states.astype(np.float32)), 1, "token")
    return {(score.system, score.probe, score.metric): score for score in probing.scores()}


def noise(size=8):
    return np.random.default_rng(1).normal(size=(NUM_ITEMS, size))


@pytest.mark.parametrize("kind", ["context", "aspect", "concreteness", "norms"])
def test_states_that_hold_the_label_give_one(make_task, kind):
    task = make_task(kind)
    found = probed(task, np.repeat(task.targets.T, 8, axis=1) + 0.05 * noise(8 * len(task.targets)))
    metrics = ["accuracy"] if task.num_classes else ["pearson", "spearman"]
    for probe, metric in product(("linear", "mlp"), metrics):
        score = found["model", probe, metric]
        assert score.value == (1.0 if task.num_classes else pytest.approx(1.0, abs=0.03))
        assert (score.n, score.details["word types"]) == (NUM_ITEMS, 50)
        assert len(score.details[f"{metric} of each seed"]) == 2


@pytest.mark.parametrize("kind", ["aspect", "concreteness"])
def test_shuffled_labels_give_chance_where_true_ones_are_found(make_task, kind):
    task = make_task(kind)
    found = probed(task, np.concatenate([np.repeat(task.targets.T, 16, axis=1), noise(32)], axis=1))
    metric, chance = ("accuracy", 0.5) if task.num_classes else ("pearson", 0.0)
    for probe in ("linear", "mlp"):
        assert found["model", probe, metric].value > 0.8
        # wide: the label's direction is strong in these states, and each fold learns it with either sign
        assert abs(found["shuffled labels", probe, metric].value - chance) < 0.35


@pytest.mark.parametrize("kind", ["aspect", "concreteness"])
def test_random_states_give_chance(make_task, kind):
    task = make_task(kind)
    chance = 0.5 if task.num_classes else 0.0
    for score in probed(task, noise()).values():
        assert abs(score.value - chance) < 0.13
        assert score.low - 0.05 < chance < score.high + 0.05


def test_ratings_that_are_alike_within_a_word_do_not_make_a_constant_look_wrong(make_task):
    """Each fold predicts the mean of the others, which is low where its own ratings are high."""
    task = make_task("concreteness")
    ratings = (np.arange(NUM_ITEMS) % 50 // 5).astype(np.float32)
    task = task._replace(targets=ratings[None])
    for score in probed(task, noise(4)).values():
        assert abs(score.value) < 0.2


def test_a_word_that_is_recognised_helps_only_in_the_published_split(make_task):
    """Ratings by word, states that name the word: nothing is known of a word that was not learned."""
    task = make_task("concreteness")
    owner = np.arange(NUM_ITEMS) % 50
    task = task._replace(targets=np.random.default_rng(2).uniform(1, 7, size=50).astype(np.float32)[None, owner])
    states = np.eye(50)[owner]
    assert probed(task, states)["model", "linear", "pearson"].value < 0.3
    assert probed(task, states, "feng2025")["model", "mlp", "pearson"].value > 0.9


def test_the_released_split_is_kept_and_elsewhere_a_fifth_is_tested(make_task):
    context, aspect = make_task("context"), make_task("aspect")
    roles = planned(context, "feng2025", 3).roles
    assert roles.shape == (3, 1, NUM_ITEMS)
    assert ((roles == TEST) == context.is_test).all()
    assert ((roles == TRAIN) == ~context.is_test).all()
    roles = planned(aspect, "feng2025", 3).roles
    assert (roles == TEST).sum(axis=-1).tolist() == [[40]] * 3
    assert (roles == roles[0]).all()


def test_no_fold_shares_a_word_type_and_seeds_have_folds_of_their_own(make_task):
    task = make_task("context")
    roles = planned(task, "bivec", 2).roles
    for its_roles in roles.reshape(-1, NUM_ITEMS):
        assert not set(task.types[its_roles == TEST]) & set(task.types[its_roles != TEST])
    assert (roles[0] != roles[1]).any()


def test_figures_are_those_of_their_items_over_word_types(make_task):
    task = make_task("aspect")
    signal = task.targets[0] + np.random.default_rng(3).normal(scale=0.7, size=NUM_ITEMS)
    score = probed(task, signal[:, None])["model", "linear", "accuracy"]
    assert score.value == pytest.approx(sum(score.items["over"]) / NUM_ITEMS)
    assert score.value == pytest.approx(np.mean(score.details["accuracy of each seed"]))
    assert score.items["under"] == [4.0] * 50
    assert 0.6 < score.low < score.value < score.high < 0.95


def test_correlations_are_scipys_over_seeds_and_dimensions(make_task):
    task = make_task("norms")
    found = probed(task, task.targets.T[:, :5] + noise(5))
    for metric, reference in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        score = found["model", "linear", metric]
        of_each = {
            name: np.mean(
                [reference(score.items[f"gold {name}"], score.items[f"predicted {s} {name}"])[0] for s in (0, 1)]
            )
            for name in DIMENSIONS
        }
        assert score.details[f"{metric} of each dimension"] == pytest.approx(of_each, abs=1e-3)
        assert score.value == pytest.approx(np.mean(list(of_each.values())), abs=1e-9)
        assert statistic_of(metric, score.items).num_items == 50
        assert score.low < score.value < score.high


def test_items_that_are_not_read_are_in_no_figure(make_task):
    task = make_task("aspect")
    plan = planned(task, "bivec", 1)
    roles = plan.roles.copy()
    roles[..., :10] = 3
    probing = Probing(task, plan._replace(roles=roles), "some")
    probing.read(("model",), torch.from_numpy(task.targets.T.astype(np.float32)), 0, "token")
    assert {score.n for score in probing.scores()} == {NUM_ITEMS - 10}


def write_context_probe(folder, task, place, num_train, num_test):
    """Nouns tell their class by how they end, in a token of its own."""
    generator = np.random.default_rng(5)
    animate, inanimate = ([f"{a}{b}{digit}" for a in "bcdfghjklm" for b in "aeiou"] for digit in "78")
    (folder / task).mkdir(parents=True)
    for split, count in (("train", num_train), ("test", num_test)):
        pairs = [generator.choice([*animate, *inanimate], 2) for _ in range(count)]
        verbs = generator.choice([f"{stem}ed" for stem in "abcdefghijkl"], count)
        rows = [
            f"the {a} {verb} the {b},{(a, b)[place] in animate:d}\n" for (a, b), verb in zip(pairs, verbs, strict=True)
        ]
        (folder / task / f"{split}.txt").write_text("".join(rows))


@pytest.fixture
def by_position(tmp_path, tiny_llama_folder):
    """by_position(window, task): the linear probe's accuracy in the last layer, at each of the five positions."""
    write_context_probe(tmp_path, "subject_animacy", 0, 400, 100)
    write_context_probe(tmp_path, "object_animacy", 1, 400, 100)

    def by_position(window, name):
        encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", window=window)
        (task,) = [task for task in read_tasks(tmp_path) if task.name == name]
        last = encoder.config.num_hidden_layers
        states = word_states(encoder, Words(task.texts, task.spans), (last,), "last").vectors(last, "token")
        plan = planned(task, "bivec", 1)
        values = []
        for place in range(5):
            probing = Probing(task, plan._replace(probes={"linear": plan.probes["linear"]}), name)
            probing.read(("model",), states[place::5], last, "token")
            values.append(probing.scores()[-1].value)
        return values

    return by_position


def test_under_the_causal_mask_a_position_knows_what_came_before_it(by_position):
    subject, object_ = by_position(CAUSAL, "subject_animacy"), by_position(CAUSAL, "object_animacy")
    assert abs(subject[0] - 0.5) < 0.05  # the first "the" is the same everywhere
    assert subject[1] > 0.95
    assert max(abs(value - 0.5) for value in object_[:4]) < 0.1
    assert object_[4] > 0.95


def test_without_the_mask_a_position_knows_what_comes_behind_it(by_position):
    assert max(by_position(BIDIRECTIONAL, "object_animacy")[:4]) > 0.65


@pytest.fixture
def probing_folder(tmp_path):
    """A file of each layout in small, with random labels."""
    generator = np.random.default_rng(5)
    folder = tmp_path / "semantic"
    write_context_probe(folder / "Task1_Context-probes", "object_animacy", 1, 48, 12)
    verbs = [f"{stem}ed" for stem in "abcdefghijkl"]
    rows = [f"{row}\tsome {verbs[row % 12]} it {row} .\t{verbs[row % 12]}\t1\t{row % 2}\n" for row in range(60)]
    (folder / "Task2").mkdir()
    (folder / "Task2" / "duration_train.txt").write_text("".join(rows))
    columns = ",".join(f"{name}.M" for name in DIMENSIONS)
    rows = [f"word,sentence,{columns}\n"]
    for word in ("act", "bank", "call", "draw", "edge", "fix", "gum", "hail", "ink", "jam"):
        for article in ("a", "the"):
            ratings = ",".join(f"{value:.2f}" for value in generator.uniform(0, 5, 11))
            rows.append(f"{word},It was {article} {word}.,{ratings}\n")
    (folder / "Task4").mkdir()
    (folder / "Task4" / "contextualized_sensorimotor_norms_with_ls.txt").write_text("".join(rows))
    return folder


def evaluated(folder, model, output, *options):
    given = ["--data", folder, "--model", model, "--output", output, "--dtype", "float32", "--seeds", 1, *options]
    found = CliRunner().invoke(cli.app, ["evaluate", "probing", *map(str, given)])
    assert found.exit_code == 0, found.output
    return Report.read(output), found.output


def test_the_command_scores_each_task_with_its_controls(probing_folder, tiny_llama_folder, tmp_path):
    folder = probing_folder / "Task4"
    (folder / "duration_train.txt").write_text((probing_folder / "Task2" / "duration_train.txt").read_text() + "bad\n")
    report, output = evaluated(
        folder, tiny_llama_folder, tmp_path / "report.json", "--on-error", "skip", "--read-out", "both"
    )
    assert report.task == "probing"
    assert list(report.data) == ["duration", "sensorimotor_norms"]
    found = {score.key: score for score in report.scores}
    # two probes in two layers of the model and of the word alone, in one of shuffled labels; one metric and two
    assert len(found) == len(report.scores) == 1 + 2 * (2 + 2 + 1) * (1 + 2)
    assert {(score.system, score.layer, score.read_out, score.probe) for score in report.scores} == {
        ("majority", None, None, None),
        *product(("model",), (0, 3), ("both",), ("linear", "mlp")),
        *product(("shuffled labels",), (3,), ("both",), ("linear", "mlp")),
        *product(("word alone",), (0, 3), ("token",), ("linear", "mlp")),
    }
    assert {score.n for score in report.scores if score.dataset == "duration"} == {60}
    assert {score.split for score in report.scores} == {"5 folds by word type"}
    assert "duration: 1 bad rows left out" in report.notes
    assert "duration: 1 bad rows left out" in output


def test_the_published_protocol_is_of_the_token_in_the_last_layer(probing_folder, tiny_llama_folder, tmp_path):
    report, _ = evaluated(probing_folder, tiny_llama_folder, tmp_path / "report.json", "--protocol", "feng2025")
    assert {(score.layer, score.read_out) for score in report.scores if score.probe} == {(3, "token")}
    splits = {score.dataset: (score.split, score.n) for score in report.scores}
    assert splits == {f"object_animacy position {place}": ("test", 12) for place in range(1, 6)} | {
        "duration": ("random fifth", 12),
        "sensorimotor_norms": ("random fifth", 4),
    }


def test_a_length_that_reaches_no_word_is_refused(probing_folder, tiny_llama_folder):
    given = ["--data", probing_folder, "--model", tiny_llama_folder, "--max-length", 3, "--seeds", 1]
    found = CliRunner().invoke(cli.app, ["evaluate", "probing", *map(str, given)])
    assert found.exit_code == 2
    assert "position 3: every word is cut off or has no token; --max-length must reach it" in found.stderr
