"""The same shards on Ray: actors embed them, Ray chooses the machines and says when one has died.

Plain actors, not Ray Data: the work is a list of numbers, and what is done stands in the output folder, which all
machines must see under the same path. A shard whose actor died goes to a fresh one.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any

from ..engine.dtype_names import leaves_open
from .manifest import Manifest
from .shards import Done
from .workers import Plan, ShardWorker

_OUTSTANDING = 2  # as for local workers
_MAX_ATTEMPTS = 3


class ShardActor:
    """A `ShardWorker` that takes shards while it works on others."""

    def __init__(self, plan: Plan, folder: str):
        self._plan, self._folder = plan, folder
        self._numbers: SimpleQueue[int] = SimpleQueue()
        self._futures: dict[int, Future[Done]] = {}

    def load(self) -> Manifest:
        """Loads the encoder and is ready; not done by the constructor, whose errors Ray takes for a death."""
        os.chdir(self._folder)
        worker = ShardWorker(self._plan)
        Thread(target=self._run, args=(worker,), daemon=True).start()
        return worker.manifest

    def embed(self, number: int) -> Done:
        """Waits until the shard is done; raises what ended the work."""
        future = self._futures.setdefault(number, Future())
        self._numbers.put(number)
        return future.result()

    def _run(self, worker: ShardWorker) -> None:
        try:
            worker.run_watched(self._taken(), lambda done: self._futures[done.number].set_result(done))
        except BaseException as error:
            for future in self._futures.values():
                if not future.done():
                    future.set_exception(error)

    def _taken(self) -> Iterator[int]:
        while True:
            yield self._numbers.get()


def on_ray(
    plan: Plan,
    numbers: Sequence[int],
    on_ready: Callable[[Manifest], object],
    on_done: Callable[[Done], object],
    *,
    address: str,
    num_workers: int | None,
) -> None:
    """Embeds shards by actors of the Ray cluster at `address`, or of one made here for `local`.

    Args:
        num_workers: default one a GPU of the cluster, or one a machine where it has none.
    Raises:
        ValueError: Ray is not installed.
        ConnectionError: no cluster answers at `address`.
        ChildProcessError: actors died again and again over one shard.
        RowError, ValueError, OSError: as `embed_shards`.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError('--ray needs Ray: pip install "bivec[ray]"') from error
    ray.init(address=address, include_dashboard=False if address == "local" else None, log_to_driver=False)
    try:
        _embed(ray, plan, numbers, on_ready, on_done, num_workers)
    finally:
        ray.shutdown()


def _embed(
    ray: Any,
    plan: Plan,
    numbers: Sequence[int],
    on_ready: Callable[[Manifest], object],
    on_done: Callable[[Done], object],
    num_workers: int | None,
) -> None:
    resources = ray.cluster_resources()
    num_gpus = 0 if plan.settings.device == "cpu" else int(resources.get("GPU", 0))
    count = min(num_workers or num_gpus or len(ray.nodes()), max(len(numbers), 1))
    num_cpus = 1 if num_gpus else max(int(resources["CPU"]) // count, 1)
    actor_class = ray.remote(
        num_cpus=num_cpus, num_gpus=1 if num_gpus else 0, max_concurrency=_OUTSTANDING + 1, max_restarts=0
    )(ShardActor)
    plan_reference = ray.put(plan)
    # as with local workers the first measures dtypes for all
    num_started = 1 if leaves_open(plan.settings.dtype) and not num_gpus else count
    left = list(reversed(numbers))
    attempts = dict.fromkeys([*numbers, None], 0)
    running: dict[Any, tuple[Any, int | None]] = {}  # a call's reference to its actor and shard; None: it loads

    def start_actor() -> None:
        actor = actor_class.remote(plan_reference, os.getcwd())
        running[actor.load.remote()] = (actor, None)

    def give_shard(actor: Any) -> None:
        if left:
            number = left.pop()
            running[actor.embed.remote(number)] = (actor, number)

    for _ in range(num_started):
        start_actor()
    while running:
        (reference, *_), _ = ray.wait(list(running), num_returns=1)
        actor, number = running.pop(reference)
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.RayActorError as error:
            lost = [number, *(n for a, n in running.values() if a is actor)]
            for call in [call for call, (a, _) in running.items() if a is actor]:
                del running[call]
            for shard in lost:
                attempts[shard] += 1
                if attempts[shard] == _MAX_ATTEMPTS:
                    raise ChildProcessError(f"{_MAX_ATTEMPTS} Ray actors died over one shard: {error}") from None
            left.extend(shard for shard in reversed(lost) if shard is not None)
            start_actor()
            continue
        if number is None:
            on_ready(result)
            for _ in range(_OUTSTANDING):
                give_shard(actor)
            if leaves_open(plan.settings.dtype):  # also for the actor that takes a dead one's place
                plan = plan.in_dtype_of(result)
                plan_reference = ray.put(plan)
            for _ in range(num_started, count):
                start_actor()
            num_started = count
        else:
            on_done(result)
            give_shard(actor)
