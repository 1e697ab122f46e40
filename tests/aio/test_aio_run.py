"""How a coroutine that a greenlet waits for begins and ends: `psofa_gevent.aio.run`.

What holds for coroutines in general is tested in test_aio.py.
"""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable
from typing import Any

import gevent
import gevent.event
import gevent.local
import gevent.lock
import gevent.queue
import gevent.socket
import pytest
from gevent import getcurrent, monkey
from greenlet import greenlet

from psofa_gevent.aio.coroutines import hub_loop, run_coroutine, run_task, spawn_coroutine
from psofa_gevent.testing import eventually

native_sleep: Callable[[float], None] = monkey.get_original("time", "sleep")


async def give(value: object) -> object:
    return value


async def wait_forever() -> None:
    await asyncio.get_running_loop().create_future()


# Beginning


def test_coroutines_begin_and_end_in_the_order_in_which_they_were_given() -> None:
    begun: list[int] = []
    ended: list[int] = []

    async def begin(number: int) -> None:
        begun.append(number)
        if number % 3 == 0:
            await asyncio.sleep(0)

    def run(number: int) -> None:
        run_coroutine(begin(number))
        ended.append(number)

    gevent.joinall([gevent.spawn(run, number) for number in range(100)], raise_error=True)
    assert begun == list(range(100))
    by_kind = sorted(ended, key=lambda number: number % 3 == 0)  # a stable sort
    assert by_kind == sorted(range(100), key=lambda number: number % 3 == 0)


def test_greenlets_that_go_on_together_wait_for_other_things_next() -> None:
    def run(number: int) -> int:
        for _ in range(50):
            run_coroutine(give(1))
            if number % 3 == 0:
                gevent.sleep(0)
            if number % 3 == 1:
                gevent.spawn(run_coroutine, give(1)).get()
        return number

    greenlets = [gevent.spawn(run, number) for number in range(100)]
    gevent.joinall(greenlets, timeout=20, raise_error=True)
    assert [each.value for each in greenlets] == list(range(100))


def test_asyncio_looks_as_it_should_in_the_first_step() -> None:
    async def look() -> None:
        task = asyncio.current_task()
        assert task is not None
        assert task in asyncio.all_tasks()
        assert asyncio.get_running_loop() is hub_loop()
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            children = [group.create_task(give(number)) for number in range(3)]
        assert [child.result() for child in children] == [0, 1, 2]
        assert asyncio.current_task() is task

    run_coroutine(look())


def test_what_the_first_step_asks_of_the_loop_is_done() -> None:
    done: list[str] = []

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(done.append, "soon")
        loop.call_later(0.001, done.append, "later")

    run_coroutine(ask())
    eventually(lambda: done == ["soon", "later"])


def test_a_coroutine_whose_greenlet_is_killed_before_it_begins_begins_and_is_cancelled() -> None:
    told: list[str] = []

    async def tell() -> None:
        told.append("began")
        try:
            await wait_forever()
        except asyncio.CancelledError:
            told.append("cancelled")
            raise

    holding, gate = gevent.event.Event(), gevent.event.Event()

    async def hold() -> None:
        holding.set()
        gate.wait()

    holder = gevent.spawn(run_coroutine, hold())
    assert holding.wait(5)
    waiting = gevent.spawn(run_coroutine, tell())
    gevent.spawn(waiting.kill).join(timeout=0.05)  # it can't begin yet, and so not end
    assert told == []
    gate.set()
    gevent.joinall([holder, waiting], timeout=5)
    assert told == ["began", "cancelled"]
    assert isinstance(waiting.value, gevent.GreenletExit)


@pytest.mark.parametrize("what", [None, 5, "coroutine"])
def test_what_is_no_coroutine_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match="coroutine"):
        run_task(what)
    assert run_coroutine(give("works")) == "works"


def test_finalizers_may_use_the_loop_while_a_task_is_made() -> None:
    called: list[int] = []

    class Finalized:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            hub_loop().call_soon(called.append, 1)

    thresholds = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(100):
            Finalized()
            assert run_coroutine(give(1)) == 1
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    eventually(lambda: len(called) == 100)


# All steps run in one greenlet


def test_a_lock_that_knows_its_owner_is_held_over_an_await() -> None:
    lock = gevent.lock.RLock()

    async def hold() -> str:
        with lock:
            await asyncio.sleep(0.001)
        return "released"

    assert run_coroutine(hold()) == "released"


def test_greenlet_locals_last_over_an_await() -> None:
    local = gevent.local.local()

    async def keep() -> object:
        local.value = "kept"
        await asyncio.sleep(0)
        return local.value

    assert run_coroutine(keep()) == "kept"


def test_a_greenlet_that_a_coroutine_drives_awaits_in_several_steps() -> None:
    # As SQLAlchemy's asyncio extension does.
    def await_only(awaitable: Any) -> object:
        parent = getcurrent().parent
        assert parent is not None
        return parent.switch(awaitable)

    def synchronous() -> str:
        await_only(asyncio.sleep(0.001))
        await_only(asyncio.sleep(0.001))
        return "done"

    async def drive() -> object:
        driven = greenlet(synchronous, getcurrent())
        result = driven.switch()
        while not driven.dead:
            result = driven.switch(await result)
        return result

    assert run_coroutine(drive(), timeout=5) == "done"


def test_the_timeout_of_a_wait_in_a_step_is_the_steps_own() -> None:
    queue: gevent.queue.Queue[int] = gevent.queue.Queue()
    ours, theirs = gevent.socket.socketpair()
    ours.settimeout(0.005)

    async def wait() -> str:
        with pytest.raises(gevent.queue.Empty):
            queue.get(timeout=0.005)
        with pytest.raises(TimeoutError):
            ours.recv(1)
        await asyncio.sleep(0)
        return "went on"

    with ours, theirs:
        assert run_coroutine(wait(), timeout=5) == "went on"


# The end


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_first_step_is_raised_by_the_waiter_alone(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[object] = []

    async def interrupt() -> None:
        kept.append(asyncio.current_task())
        raise kind

    def run() -> str:
        with pytest.raises(kind):
            run_coroutine(interrupt())
        return "raised"

    assert gevent.spawn(run).get(timeout=5) == "raised"
    kept.clear()
    gc.collect()
    gevent.sleep(0.2)  # this is the main greenlet, and nothing is thrown into it
    assert caplog.text == ""  # of a task whose exception was never retrieved


@pytest.mark.parametrize("how", ["returns", "raises", "suspends", "is killed", "is killed in wait"])
def test_a_finished_coroutine_leaves_nothing_to_the_garbage_collector(how: str) -> None:
    class Local:
        pass

    begun = gevent.event.Event()

    async def run(_local: Local) -> None:
        begun.set()
        if how == "raises":
            raise LookupError
        if how == "suspends":
            await asyncio.sleep(0)
        if how == "is killed":
            await asyncio.sleep(60)
        if how == "is killed in wait":
            gevent.sleep(60)

    def swallow(local: Local) -> None:
        try:
            run_coroutine(run(local))
        except (LookupError, gevent.GreenletExit):
            pass

    def main() -> weakref.ref[Local]:
        local = Local()
        waiting = gevent.spawn(swallow, local)
        assert begun.wait(5)
        if "killed" in how:
            waiting.kill(timeout=5)
        waiting.get(timeout=5)
        return weakref.ref(local)

    gc.collect()
    gc.disable()
    try:
        reference = gevent.spawn(main).get()
        eventually(lambda: reference() is None)
    finally:
        gc.enable()


def test_a_coroutine_that_begins_and_waits_for_another_thread_keeps_the_hub_alive() -> None:
    async def wait_for_thread() -> str:
        # No timer, no connection: only the thread knows of it.
        await asyncio.get_running_loop().run_in_executor(None, native_sleep, 0.05)
        return "woken"

    waiting = spawn_coroutine(wait_for_thread())
    assert gevent.wait([waiting], timeout=None)[0].value == "woken"
