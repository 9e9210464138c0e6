"""What follows from all figures of an evaluation: the model's lead over its baselines, and means over the data sets."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .baselines import BASELINES
from .report import Score, statistic_of
from .statistics import Bootstrap, Difference, Statistic, bootstrap, mean_of_sets

DATA_SETS = "data sets"  # of a mean's details: each set's name and split


def summarized(scores: Sequence[Score], *, means: bool) -> list[Score]:
    """The scores, each baseline's with how far the model is ahead of it, and behind them means over the data sets.

    A lead that a score has already stays.

    A mean is of one metric and system. Sets count alike, however large they are; `n` is of all together. Its interval
    is from resamples of each set on its own, as is the model's lead in it.
    """
    behind = [score for score in scores if score.system in BASELINES and score.lead is None]
    drawn = _bootstraps(scores) if means or behind else {}
    found = [*scores, *(_means(scores, drawn) if means else [])]
    models = {score.key: score for score in found if score.system == "model"}

    def lead(score: Score) -> Difference | None:
        if score.lead is not None:
            return score.lead
        model = models.get(replace(score, system="model").key) if score.system in BASELINES else None
        if model is None or score.key not in drawn or model.key not in drawn or not _are_paired(score, model):
            return None
        return drawn[model.key].over(drawn[score.key])

    return [replace(score, lead=lead(score)) for score in found]


def difference(first: Sequence[Score], second: Sequence[Score]) -> Difference | None:
    """Second minus first, each the mean of one figure or of several sets'; None where items cannot be paired."""
    sets = []
    for place, (ours, theirs) in enumerate(zip(first, second, strict=True)):
        before, after = (statistic_of(score.metric, score.items) for score in (ours, theirs))
        if before is None or after is None or not _are_paired(ours, theirs):
            return None
        sets.append(bootstrap([before.statistic, after.statistic], before.num_items, seed=place))
    means = [mean_of_sets(systems) for systems in zip(*sets, strict=True)]
    return means[1].over(means[0])


def parts_of(mean: Score, scores: dict[tuple, Score]) -> list[Score]:
    """The figures that a mean is of, from all of its report by key; the score itself where it is no mean."""
    if DATA_SETS not in mean.details:
        return [mean]
    return [scores[replace(mean, dataset=name, split=split).key] for name, split in mean.details[DATA_SETS].items()]


def _bootstraps(scores: Sequence[Score]) -> dict[tuple, Bootstrap]:
    """Of each score that has items, by its key: on the same resamples within a data set, on others in another."""
    datasets = list(dict.fromkeys(score.dataset for score in scores))
    alike: dict[tuple[str, int], dict[tuple, Statistic]] = {}
    for score in scores:
        found = statistic_of(score.metric, score.items)
        if found is not None:
            alike.setdefault((score.dataset, found.num_items), {})[score.key] = found.statistic
    drawn: dict[tuple, Bootstrap] = {}
    for (dataset, num_items), statistics in alike.items():
        values = bootstrap(list(statistics.values()), num_items, seed=datasets.index(dataset))
        drawn |= zip(statistics, values, strict=True)
    return drawn


def _means(scores: Sequence[Score], drawn: dict[tuple, Bootstrap]) -> Iterator[Score]:
    """Means where a system has one metric on more than one data set, once on each; they are added to `drawn`."""
    groups: dict[tuple, list[Score]] = {}
    for score in scores:
        groups.setdefault((score.metric, score.layer, score.read_out, score.probe, score.system), []).append(score)
    for parts in groups.values():
        splits = {score.dataset: score.split for score in parts}
        if not len(parts) == len(splits) > 1 or any(score.key not in drawn for score in parts):
            continue
        found = mean_of_sets([drawn[score.key] for score in parts])
        mean = replace(
            parts[0],
            dataset=f"mean of {len(parts)}",
            split=", ".join(sorted(set(splits.values()))),
            **found.estimate()._asdict(),
            n=sum(score.n or 0 for score in parts) or None,
            items={},
            details={DATA_SETS: splits},
        )
        drawn[mean.key] = found
        yield mean


def _are_paired(first: Score, second: Score) -> bool:
    """Whether two scores are of the same items, in so far as that can be told, or means over the same sets."""
    length = [len(next(iter(score.items.values()), [])) for score in (first, second)]
    of_sets = [score.details.get(DATA_SETS) for score in (first, second)]
    clusters = [score.items.get("cluster") for score in (first, second)]
    return all(one == other for one, other in (length, of_sets, clusters))
