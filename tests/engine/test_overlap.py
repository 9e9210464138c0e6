"""Stages in threads: in order, bounded, and whatever one of them raises is raised."""

import threading
import time

import pytest

from bivec.engine.overlap import Behind, ahead


def threads() -> int:
    return sum(thread.name in ("ahead", "behind") for thread in threading.enumerate())


def test_items_come_in_order_and_no_more_than_a_few_ahead():
    made = []

    def items():
        for number in range(20):
            made.append(number)
            yield number

    seen = []
    for number in ahead(items()):
        time.sleep(0.005)
        assert len(made) <= number + 4
        seen.append(number)
    assert seen == list(range(20))
    assert threads() == 0


def test_the_producer_runs_while_the_consumer_is_busy():
    second = threading.Event()

    def items():
        yield 1
        second.set()
        yield 2

    found = ahead(items())
    assert next(found) == 1
    assert second.wait(5)
    assert list(found) == [2]


def test_what_the_producer_raises_is_raised_after_what_it_gave():
    def items():
        yield 1
        raise OSError("torn")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(OSError, match="torn"):
        next(found)
    assert threads() == 0


def test_a_consumer_that_leaves_ends_the_producer():
    found = ahead(iter(range(10**9)))
    assert next(found) == 0
    found.close()
    assert threads() == 0


def test_a_producer_that_waits_for_ever_does_not_keep_its_consumer():
    never = threading.Event()

    def items():
        yield 1
        never.wait()

    found = ahead(items())
    assert next(found) == 1
    before = time.monotonic()
    found.close()
    assert time.monotonic() - before < 5
    never.set()


def test_behind_acts_in_order_and_is_done_when_left():
    seen = []

    def slowly(item):
        time.sleep(0.002)
        seen.append(item)

    with Behind(slowly) as behind:
        for number in range(20):
            behind.put(number)
    assert seen == list(range(20))
    assert threads() == 0


@pytest.mark.parametrize("last", [False, True])
def test_what_the_action_raises_is_raised_and_nothing_is_done_after_it(last):
    seen = []

    def action(item):
        if item == 3:
            raise OSError("full")
        seen.append(item)

    def put_all():
        with Behind(action) as behind:
            for number in range(4 if last else 100):
                behind.put(number)

    with pytest.raises(OSError, match="full"):
        put_all()
    assert seen == [0, 1, 2]
    assert threads() == 0


def test_leaving_with_an_exception_ends_what_was_begun():
    seen, release = [], threading.Event()

    def action(item):
        release.wait(5)
        seen.append(item)

    def fail():
        with Behind(action) as behind:
            behind.put(1)
            behind.put(2)
            threading.Timer(0.05, release.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert seen == [1, 2]
    assert threads() == 0
