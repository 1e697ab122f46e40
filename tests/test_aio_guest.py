"""Greenlets that take the first step of their coroutines themselves.

What holds wherever the first step is taken is tested in test_aio.py, for both.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import gevent
import gevent.event
import pytest
from gevent import getcurrent
from greenlet import greenlet

from psofa_gevent.aio import hub_loop, run_callback, run_coroutine
from psofa_gevent.aio_guest import GuestGreenlet
from psofa_gevent.testing import eventually


async def give(value: object) -> object:
    return value


async def give_later(value: object) -> object:
    await asyncio.sleep(0)
    return value


@pytest.fixture(autouse=True)
def loop_is_there_and_free() -> Iterator[None]:
    """As it is when a session's callback begins, and shall be again after the test."""
    run_coroutine(give_later(None))
    hooks = sys.get_asyncgen_hooks()
    yield
    host = hub_loop().greenlet
    assert (host.guest, host.thrown, asyncio._get_running_loop()) == (None, None, None)
    assert sys.get_asyncgen_hooks() == hooks
    assert run_coroutine(give_later("works")) == "works"
    assert visit(where()) is not host


def start(function: Callable[[], object]) -> gevent.Greenlet[..., Any]:
    guest: gevent.Greenlet[..., Any] = GuestGreenlet(function)
    guest.start()
    return guest


def visit(coro: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine as a callback: in a greenlet that takes its first step."""
    raised: list[Exception] = []

    def run() -> object:
        try:
            return run_callback(coro)
        except Exception as error:
            raised.append(error)
            return None

    result = start(run).get(timeout=5)
    if raised:
        raise raised.pop()
    return result


async def where() -> greenlet:
    return getcurrent()


def test_a_coroutine_that_never_suspends_runs_in_the_greenlet_that_waits_for_it() -> None:
    def run() -> bool:
        return run_callback(where()) is getcurrent()

    assert start(run).get(timeout=5) is True


def test_a_coroutine_that_suspends_goes_on_in_the_loops_greenlet() -> None:
    async def suspend() -> tuple[object, object]:
        first = getcurrent()
        await asyncio.sleep(0)
        return first, getcurrent()

    first, second = visit(suspend())
    assert isinstance(first, GuestGreenlet)
    assert second is hub_loop().greenlet


def test_asyncio_looks_as_it_should_in_the_first_step() -> None:
    async def look() -> None:
        task = asyncio.current_task()
        assert task is not None
        assert task in asyncio.all_tasks()
        assert asyncio.get_running_loop() is hub_loop()
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            children = [group.create_task(give_later(number)) for number in range(3)]
        assert [child.result() for child in children] == [0, 1, 2]
        assert asyncio.current_task() is task

    visit(look())


def test_a_timeout_of_asyncios_that_begins_in_the_first_step_ends_later_ones() -> None:
    async def wait() -> None:
        async with asyncio.timeout(0.005):
            await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        visit(wait())


def test_async_generators_of_the_first_step_are_closed_on_the_loop() -> None:
    closed: list[object] = []

    async def generate() -> Any:
        try:
            yield 1
        finally:
            closed.append(asyncio.get_running_loop())

    async def leave_one_behind() -> None:
        async for _ in generate():
            break

    visit(leave_one_behind())
    eventually(lambda: closed == [hub_loop()])


def test_what_the_first_step_asks_of_the_loop_is_done() -> None:
    done: list[str] = []

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(done.append, "soon")
        loop.call_later(0.001, done.append, "later")

    visit(ask())
    eventually(lambda: done == ["soon", "later"])


@pytest.mark.logs_errors
def test_a_gevent_timeout_around_an_await_is_reported_and_harmless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def misuse() -> str:
        with gevent.Timeout(0.005):
            await asyncio.sleep(0.02)
        return "went on"

    assert visit(misuse()) == "went on"
    assert "Timeout" in caplog.text


def test_a_kill_while_the_first_step_waits_cancels_it_and_comes_afterwards() -> None:
    told: list[object] = []
    holding = gevent.event.Event()

    async def hold() -> None:
        holding.set()
        try:
            gevent.sleep(60)
        except asyncio.CancelledError:
            told.append("cancelled")
        # The kill is not forgotten when what it interrupted goes on.
        await asyncio.sleep(0.001)
        told.append("ended")

    guest = start(partial(run_callback, hold()))
    assert holding.wait(5)
    guest.kill(timeout=5)
    assert guest.dead
    assert isinstance(guest.value, gevent.GreenletExit)
    assert told == ["cancelled", "ended"]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_the_first_step_is_raised_by_the_waiter_alone(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    async def interrupt() -> None:
        raise kind

    def run() -> str:
        with pytest.raises(kind):
            run_callback(interrupt())
        return "raised"

    assert start(run).get(timeout=5) == "raised"
    gc.collect()
    assert caplog.text == ""  # of a task whose exception was never retrieved


@pytest.mark.hub_errors
def test_a_first_step_that_is_killed_in_its_wait_and_interrupts_leaves_no_kill_to_the_next() -> (
    None
):
    holding = gevent.event.Event()

    async def hold() -> None:
        holding.set()
        try:
            gevent.sleep(60)
        finally:
            raise SystemExit

    def run() -> None:
        with pytest.raises(SystemExit):
            run_callback(hold())

    guest = start(run)
    assert holding.wait(5)
    guest.kill(timeout=5)
    assert visit(give("not killed")) == "not killed"


def test_a_second_guest_waits_for_the_first_and_is_run_by_the_loop() -> None:
    holding, gate = gevent.event.Event(), gevent.event.Event()

    async def hold() -> None:
        holding.set()
        gate.wait()

    first = start(partial(run_callback, hold()))
    assert holding.wait(5)
    second = start(partial(run_callback, where()))
    gevent.sleep(0.01)  # turns of the hub
    assert not second.ready()
    gate.set()
    first.get(timeout=5)
    assert second.get(timeout=5) is hub_loop().greenlet


def test_a_greenlet_inside_the_first_step_may_wait() -> None:
    # As SQLAlchemy does: a plain greenlet, of which gevent knows nothing.
    async def switch() -> str:
        greenlet(gevent.sleep).switch(0.005)
        return "slept"

    guest = start(partial(run_callback, switch()))
    gevent.sleep(0)
    asked: list[int] = []
    hub_loop().call_soon_threadsafe(asked.append, 1)  # not in the middle of that step
    gevent.sleep(0.001)
    assert guest.get(timeout=5) == "slept"
    eventually(lambda: asked == [1])


@pytest.mark.logs_errors
def test_a_stray_kill_of_the_loop_while_a_guest_waits_is_reported_and_dropped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    holding, gate = gevent.event.Event(), gevent.event.Event()

    async def hold() -> str:
        holding.set()
        gate.wait()
        return "went on"

    guest = start(partial(run_callback, hold()))
    assert holding.wait(5)
    hub_loop().greenlet.throw()
    gate.set()
    assert guest.get(timeout=5) == "went on"
    eventually(lambda: "dropped" in caplog.text)


@pytest.mark.parametrize("how", ["returns", "raises", "suspends", "is killed", "is killed in wait"])
def test_a_finished_guest_leaves_nothing_to_the_garbage_collector(how: str) -> None:
    holding = gevent.event.Event()

    class Local:
        pass

    async def run(local: Local) -> None:
        holding.set()
        if how == "raises":
            raise ValueError
        if how == "suspends":
            await asyncio.sleep(0)
        if how == "is killed":
            await asyncio.sleep(60)
        if how == "is killed in wait":
            gevent.sleep(60)

    def main() -> weakref.ref[Local]:
        local = Local()
        reference = weakref.ref(local)
        guest = start(partial(swallow, partial(run_callback, run(local))))
        holding.wait(5)
        if "killed" in how:
            guest.kill()
        guest.join(5)
        return reference

    def swallow(function: Callable[[], object]) -> None:
        try:
            function()
        except (ValueError, gevent.GreenletExit):
            pass

    gc.collect()
    gc.disable()
    try:
        reference = gevent.spawn(main).get()
        eventually(lambda: reference() is None)
    finally:
        gc.enable()


def test_a_forked_childs_guests_visit_the_childs_own_loop() -> None:
    def run() -> bool:
        parents = run_callback(where()) is getcurrent() and hub_loop()
        pid = gevent.os.fork()
        if pid == 0:
            try:
                childs = run_callback(give_later(1)) == 1 and run_callback(where()) is getcurrent()
                os._exit(0 if childs and hub_loop() is not parents else 1)
            finally:
                os._exit(2)
        _, status = gevent.os.waitpid(pid, 0)
        return bool(parents) and os.waitstatus_to_exitcode(status) == 0

    assert start(run).get(timeout=20)


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
            assert visit(give(1)) == 1
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    eventually(lambda: len(called) == 100)


class Interrupt(BaseException):
    """What a signal handler raises."""


class InterruptAfter:
    """Raises `Interrupt` after so many calls in the modules of the loop and its guests.

    Where a signal handler would: when a function begins, or a call of one in C returns.
    """

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __enter__(self) -> InterruptAfter:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *_exc_info: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: Any, event: str, _arg: object) -> None:
        if event in ("call", "c_return") and "psofa_gevent/aio_" in frame.f_code.co_filename:
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise Interrupt


@pytest.mark.logs_errors  # of the task that was to be run
@pytest.mark.filterwarnings("ignore:coroutine.*was never awaited")
def test_a_signal_in_the_middle_of_a_visit_leaves_the_loop_working() -> None:
    def run(calls: int) -> bool:
        try:
            with InterruptAfter(calls) as interrupt:
                run_callback(give(1))
        except Interrupt:
            return True
        return interrupt.left <= 0

    calls = 0
    while start(partial(run, calls := calls + 1)).get(timeout=5):
        host = hub_loop().greenlet
        assert (host.guest, asyncio._get_running_loop()) == (None, None), calls
        assert visit(give_later(calls)) == calls
    assert calls > 5
