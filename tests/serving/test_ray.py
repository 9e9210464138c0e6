"""Actors of Ray, without Ray: which dtype each is started in, also the one that takes a dead one's place."""

from functools import partial
from types import SimpleNamespace

import pytest

from bivec.serving import ray
from bivec.serving.manifest import Manifest
from bivec.serving.settings import EmbedSettings
from bivec.serving.workers import Plan


class Died(Exception):
    pass


@pytest.fixture
def cluster():
    """Calls are made when their results are asked for, the oldest first."""

    def remote(**_):
        return lambda kind: SimpleNamespace(remote=lambda *given: of(kind(*given)))

    def of(actor):
        calls = {name: partial(partial, getattr(actor, name)) for name in ("load", "embed")}
        return SimpleNamespace(**{name: SimpleNamespace(remote=call) for name, call in calls.items()})

    return SimpleNamespace(
        exceptions=SimpleNamespace(RayTaskError=type("", (Exception,), {}), RayActorError=Died),
        cluster_resources=lambda: {"CPU": 8.0},
        put=lambda value: value,
        remote=remote,
        wait=lambda calls, num_returns: (calls[:num_returns], calls[num_returns:]),
        get=lambda call: call(),
    )


@pytest.mark.parametrize("dies", ["load", "embed"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_what_one_actor_measures_holds_for_all(monkeypatch, cluster, num_workers, dies):
    """bfloat16 is faster for the first actor that loads, and float32 for all others."""
    started, ready, done, died = [], [], [], []

    class Actor:
        def __init__(self, plan, folder):
            started.append(plan.settings.dtype)
            self.asked = plan.settings.dtype

        def load(self):
            self.die_once("load")
            measured = "float32" if ready else "bfloat16"
            return Manifest({"encoder": {"dtype": measured if self.asked == "auto" else self.asked}}, [], [])

        def embed(self, number):
            self.die_once("embed")
            return number

        def die_once(self, where):
            if where == dies and not died:
                died.append(where)
                raise Died

    monkeypatch.setattr(ray, "ShardActor", Actor)
    settings = EmbedSettings(inputs=[], output="out", model="stub")
    plan = Plan(
        settings=settings, load=lambda _: pytest.fail("nothing is loaded"), files=[], stamps=[], inputs=[], shards=[]
    )
    ray._embed(cluster, plan, range(7), ready.append, done.append, num_workers)
    assert {found.configuration["encoder"]["dtype"] for found in ready} == {"bfloat16"}
    assert sorted(done) == list(range(7))
    open_ones = 2 if dies == "load" else 1
    assert started == ["auto"] * open_ones + ["bfloat16"] * (num_workers + 1 - open_ones)
