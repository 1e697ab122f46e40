"""Coroutines run from greenlets, and greenlets awaited in coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import inspect
import time
import weakref
from collections.abc import Coroutine, Generator
from typing import Any

import gevent
import gevent.event
import gevent.lock
import pytest
from greenlet import greenlet

from helpers import NativeThread
from psofa_gevent.aio.coroutines import (
    await_greenlet,
    hub_loop,
    run_coroutine,
    run_task,
    spawn_coroutine,
)
from psofa_gevent.hub.greenlets import in_coroutine
from psofa_gevent.testing import eventually

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


async def give(value: object) -> object:
    await asyncio.sleep(0)
    return value


async def wait_forever() -> None:
    await asyncio.get_running_loop().create_future()


class Witness:
    """A coroutine function that waits until cancelled, and tells what happened to it."""

    def __init__(self, *, cancellations: int = 1, cleanup: float = 0.0) -> None:
        self.cancellations = cancellations
        self.cleanup = cleanup
        self.started = gevent.event.Event()
        self.cancelled = 0
        self.ended = False

    async def __call__(self) -> None:
        self.started.set()
        try:
            while True:
                try:
                    await wait_forever()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    if self.cancelled == self.cancellations:
                        raise
        finally:
            await asyncio.sleep(self.cleanup)
            self.ended = True


# Running


def test_a_coroutine_returns_its_result_to_a_greenlet() -> None:
    assert run_coroutine(give(5)) == 5
    assert gevent.spawn(run_coroutine, give(6)).get() == 6


def test_a_coroutine_raises_in_the_greenlet() -> None:
    async def fail() -> None:
        await asyncio.sleep(0)
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        run_coroutine(fail())


def test_two_greenlets_run_coroutines_at_once() -> None:
    arrived: list[asyncio.Event] = []

    async def meet() -> int:
        mine = asyncio.Event()
        arrived.append(mine)
        if len(arrived) == 2:
            for event in arrived:
                event.set()
        await mine.wait()
        return len(arrived)

    greenlets = [gevent.spawn(run_coroutine, meet()) for _ in range(2)]
    gevent.joinall(greenlets, timeout=5, raise_error=True)
    assert [each.value for each in greenlets] == [2, 2]


def test_hundreds_of_greenlets_run_coroutines_at_once() -> None:
    async def work(number: int) -> int:
        for _ in range(5):
            await asyncio.sleep(0.001 * (number % 5))
        return number

    def run(number: int) -> list[int]:
        return [run_coroutine(work(number)), run_coroutine(work(number + 1))]

    greenlets = [gevent.spawn(run, number) for number in range(500)]
    assert [each.get() for each in greenlets] == [[n, n + 1] for n in range(500)]


def test_other_awaitables_are_run_too() -> None:
    class Ready:
        def __await__(self) -> Generator[Any, None, str]:
            yield from asyncio.sleep(0).__await__()
            return "ready"

    future: asyncio.Future[str] = hub_loop().create_future()
    gevent.spawn_later(0.001, future.set_result, "done")
    assert run_coroutine(Ready()) == "ready"
    assert run_coroutine(future) == "done"
    with pytest.raises(TypeError, match="await"):
        run_coroutine(5)  # type: ignore[arg-type]  # the point of it


def test_objects_made_in_one_coroutine_work_in_all_others() -> None:
    """The wrong-loop problem: a library keeps the loop on which its object was made."""

    class Library:
        def __init__(self) -> None:
            self.loop = asyncio.get_running_loop()
            self.lock = asyncio.Lock()

        async def call(self) -> bool:
            async with self.lock:
                answer = self.loop.create_future()
                self.loop.call_later(0.001, answer.set_result, True)
                return await answer and self.loop is asyncio.get_running_loop()

    async def make() -> Library:
        return Library()

    library = gevent.spawn(run_coroutine, make()).get()
    greenlets = [gevent.spawn(run_coroutine, library.call()) for _ in range(20)]
    assert all(each.get() for each in greenlets)


def test_the_loop_is_running_inside_coroutines_only() -> None:
    def running() -> asyncio.AbstractEventLoop | None:
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            return None

    async def look() -> tuple[object, object]:
        await asyncio.sleep(0)
        return running(), asyncio.current_task()

    witness = spawn_coroutine(asyncio.sleep(0.01))
    loop, task = run_coroutine(look())
    assert loop is hub_loop()
    assert isinstance(task, asyncio.Task)
    assert not witness.dead
    assert running() is None
    witness.kill()


def test_a_coroutine_sees_a_copy_of_its_callers_context() -> None:
    async def change() -> str:
        seen = variable.get()
        variable.set("changed")
        await asyncio.sleep(0)
        return seen + variable.get()

    def run() -> tuple[str, str]:
        variable.set("mine ")
        return run_coroutine(change()), variable.get()

    assert gevent.spawn(run).get() == ("mine changed", "mine ")


def test_coroutines_run_in_one_context_share_its_variables() -> None:
    async def change(value: str) -> str:
        seen = variable.get()
        variable.set(value)
        await asyncio.sleep(0)
        return seen

    context = contextvars.copy_context()
    assert run_task(change("one"), context=context) == "unset"
    assert run_task(change("two"), context=context) == "one"
    assert variable.get() == "unset"
    assert context[variable] == "two"


# Ending


def test_a_timeout_cancels_and_waits_until_the_coroutine_has_ended() -> None:
    witness = Witness(cleanup=0.02)
    with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        run_coroutine(witness(), timeout=0.01)
    assert witness.ended
    assert run_coroutine(give(1), timeout=5) == 1
    with pytest.raises(TimeoutError):
        run_coroutine(wait_forever(), timeout=0)


def test_a_gevent_timeout_around_it_ends_it() -> None:
    witness = Witness()
    with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
        run_coroutine(witness(), timeout=5)
    assert witness.ended


def test_killing_the_waiting_greenlet_cancels_and_waits() -> None:
    witness = Witness(cleanup=0.02)
    waiting = gevent.spawn(run_coroutine, witness())
    witness.started.wait()
    waiting.kill()
    assert witness.ended
    assert isinstance(waiting.value, gevent.GreenletExit)


def test_each_further_kill_cancels_again() -> None:
    witness = Witness(cancellations=3)
    waiting = gevent.spawn(run_coroutine, witness())
    witness.started.wait()
    for count in (1, 2):
        waiting.kill(timeout=0.01)
        eventually(lambda: witness.cancelled == count)  # noqa: B023  # called within the loop
        assert not waiting.dead
    waiting.kill()
    assert witness.ended


def test_a_kill_is_not_lost_when_a_timeout_comes_after_it() -> None:
    witness = Witness(cancellations=2)

    def run() -> None:
        with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.02):
            run_coroutine(witness())

    waiting = gevent.spawn(run)
    witness.started.wait()
    waiting.kill()
    assert isinstance(waiting.value, gevent.GreenletExit)


@pytest.mark.hub_errors
def test_what_a_cancelled_coroutine_raises_itself_is_raised() -> None:
    async def fail_when_cancelled() -> None:
        started.set()
        try:
            await wait_forever()
        finally:
            raise LookupError("while cleaning up")

    started = gevent.event.Event()
    waiting = gevent.spawn(run_coroutine, fail_when_cancelled())
    assert started.wait(5)
    waiting.kill()
    assert isinstance(waiting.exception, LookupError)


def test_a_coroutine_that_is_cancelled_by_others_raises_cancelled_error() -> None:
    async def cancel_myself() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with pytest.raises(asyncio.CancelledError):
        run_coroutine(cancel_myself())


def test_all_tasks_of_the_loop_can_be_cancelled() -> None:
    begun, other = Witness(), Witness()

    def run(coroutine: Coroutine[Any, Any, None]) -> str:
        with pytest.raises(asyncio.CancelledError):
            run_coroutine(coroutine)
        return "cancelled"

    def cancel_all() -> None:
        for task in asyncio.all_tasks(hub_loop()):
            task.cancel()

    waiting = [gevent.spawn(run, begun())]
    begun.started.wait()
    waiting.append(gevent.spawn(run, other()))
    other.started.wait()
    gevent.spawn(cancel_all).join()
    assert [each.get(timeout=5) for each in waiting] == ["cancelled"] * 2


def test_a_finished_coroutine_leaves_nothing_to_the_garbage_collector() -> None:
    class Probe:
        pass

    async def fail(_probe: Probe) -> None:
        await asyncio.sleep(0)
        raise LookupError

    def run() -> weakref.ref[Probe]:
        probe = Probe()
        with pytest.raises(LookupError):
            run_coroutine(fail(probe))
        return weakref.ref(probe)

    gc.collect()
    gc.disable()
    try:
        reference = gevent.spawn(run).get()
        eventually(lambda: reference() is None)
    finally:
        gc.enable()


# Where it is refused


def test_waiting_inside_a_coroutine_is_refused() -> None:
    async def run_another() -> None:
        run_coroutine(give(1))

    with pytest.raises(RuntimeError, match="await it"):
        run_coroutine(run_another())


def test_waiting_in_the_hub_is_refused() -> None:
    errors: list[Exception] = []

    def run_in_hub() -> None:
        try:
            run_coroutine(give(1))
        except RuntimeError as error:
            errors.append(error)

    gevent.get_hub().loop.run_callback(run_in_hub)
    eventually(lambda: errors)
    assert "hub" in str(errors[0])


def test_in_coroutine_tells_a_step_of_the_loop_from_all_else() -> None:
    seen: dict[str, bool] = {}

    async def look() -> None:
        seen["task"] = in_coroutine()
        hub_loop().call_soon(lambda: seen.update(callback=in_coroutine()))
        # What SQLAlchemy does: a greenlet of its own, switched to by the coroutine.
        greenlet(lambda: seen.update(inner_greenlet=in_coroutine())).switch()
        await asyncio.sleep(0)

    def look_in_greenlet() -> None:
        seen["greenlet"] = in_coroutine()

    run_coroutine(look())
    gevent.spawn(look_in_greenlet).join()
    gevent.get_hub().loop.run_callback(lambda: seen.update(hub=in_coroutine()))
    eventually(lambda: "hub" in seen)
    seen["main"] = in_coroutine()
    assert seen == {
        "task": True,
        "callback": True,
        "inner_greenlet": True,
        "greenlet": False,
        "hub": False,
        "main": False,
    }


# Spawning


def test_a_spawned_coroutine_is_a_greenlet() -> None:
    async def own_name() -> str:
        task = asyncio.current_task()
        assert task is not None
        return task.get_name()

    spawned = spawn_coroutine(own_name(), name="mine")
    assert spawned.name == "mine"
    assert not spawned.ready()
    assert spawned.get(timeout=5) == "mine"
    assert spawn_coroutine(give(1)).get() == 1


def test_killing_a_spawned_coroutine_cancels_it() -> None:
    witness = Witness(cleanup=0.01)
    spawned = spawn_coroutine(witness())
    witness.started.wait()
    spawned.kill()
    assert witness.ended


def test_a_spawned_coroutine_killed_before_it_began_is_closed() -> None:
    coroutine = wait_forever()
    spawn_coroutine(coroutine).kill()
    eventually(lambda: inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED)


# Awaiting greenlets


def test_a_greenlet_is_awaited() -> None:
    def work() -> str:
        gevent.sleep(0.001)
        return "result"

    async def main() -> list[object]:
        unstarted: gevent.Greenlet[[], str] = gevent.Greenlet(work)
        ended = gevent.spawn(work)
        started = gevent.spawn(work)
        while not ended.dead:
            await asyncio.sleep(0.001)
        return await asyncio.gather(*map(await_greenlet, (unstarted, ended, started)))

    assert run_coroutine(main()) == ["result"] * 3


@pytest.mark.hub_errors
def test_an_awaited_greenlet_raises_in_the_coroutine() -> None:
    def divide() -> float:
        return 1 / 0

    def stop() -> None:
        raise StopIteration  # which no future can hold

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await await_greenlet(gevent.spawn(divide))
        with pytest.raises(RuntimeError, match="StopIteration"):
            await await_greenlet(gevent.spawn(stop))

    run_coroutine(main())


def test_an_awaited_greenlet_that_is_killed_gives_what_get_gives() -> None:
    async def main() -> object:
        victim: gevent.Greenlet[..., object] = gevent.spawn(gevent.sleep, 60)
        gevent.spawn_later(0.001, victim.kill)
        return await await_greenlet(victim)

    assert isinstance(run_coroutine(main()), gevent.GreenletExit)


def test_cancelling_kills_the_awaited_greenlet_and_waits_for_its_end() -> None:
    told: list[str] = []

    def work() -> None:
        try:
            gevent.sleep(60)
        finally:
            gevent.sleep(0.02)
            told.append("cleaned up")

    with pytest.raises(TimeoutError):
        run_coroutine(await_greenlet(gevent.spawn(work)), timeout=0.01)
    assert told == ["cleaned up"]


def test_a_shielded_greenlet_survives_the_cancellation() -> None:
    async def main(greenlet: gevent.Greenlet[..., Any]) -> None:
        await asyncio.shield(await_greenlet(greenlet))

    gate = gevent.event.Event()
    shielded = gevent.spawn(gate.wait)
    with pytest.raises(TimeoutError):
        run_coroutine(main(shielded), timeout=0.01)
    gate.set()
    assert shielded.get(timeout=5)


def test_a_greenlet_is_awaited_on_the_loop_of_its_own_hub_only() -> None:
    with pytest.raises(RuntimeError, match="run_coroutine"):
        NativeThread(run_coroutine, await_greenlet(gevent.spawn(gevent.sleep))).wait()


# Steps that wait in gevent's way


def test_a_coroutine_that_waits_in_gevents_way_holds_coroutines_but_not_greenlets() -> None:
    order: list[str] = []
    gate = gevent.event.Event()
    holding = gevent.event.Event()

    async def hold() -> None:
        order.append("hold")
        holding.set()
        gate.wait()
        order.append("held")
        await asyncio.sleep(0)

    async def other() -> None:
        order.append("other")

    waiting = [gevent.spawn(run_coroutine, hold())]
    holding.wait()
    waiting.append(gevent.spawn(run_coroutine, other()))
    for _ in range(10):
        gevent.sleep(0.001)
        order.append("greenlet")
    gate.set()
    gevent.joinall(waiting, timeout=5, raise_error=True)
    assert order == ["hold", *["greenlet"] * 10, "held", "other"]


def test_a_held_loop_is_hidden_from_other_greenlets_and_found_again() -> None:
    seen: list[object] = []

    async def hold(how: str) -> None:
        task = asyncio.current_task()
        holding.set()
        if how == "event":
            gate.wait()
        else:
            with pytest.raises(gevent.Timeout), gevent.Timeout(0.01):
                gevent.sleep(60)
        seen.append(asyncio.get_running_loop() is hub_loop() and asyncio.current_task() is task)
        await asyncio.sleep(0)

    for how in ("event", "timeout"):
        holding, gate = gevent.event.Event(), gevent.event.Event()
        waiting = gevent.spawn(run_coroutine, hold(how))
        assert holding.wait(5)
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        assert asyncio.current_task(hub_loop()) is None
        # Another loop can run meanwhile. (In a patched process it waits in gevent's way.)
        assert asyncio.run(give("beside")) == "beside"
        gate.set()
        waiting.get(timeout=5)
    assert seen == [True, True]


def test_a_held_coroutine_is_interrupted_when_its_waiter_is_killed() -> None:
    told: list[str] = []

    holding = gevent.event.Event()

    async def hold() -> None:
        holding.set()
        try:
            gevent.sleep(60)
        except asyncio.CancelledError:
            # One cancellation, so the cleanup can await.
            await asyncio.sleep(0.001)
            told.append("cleaned up")
            raise

    waiting = gevent.spawn(run_coroutine, hold())
    assert holding.wait(5)
    waiting.kill(timeout=5)
    assert waiting.dead
    assert told == ["cleaned up"]


def test_a_held_coroutine_that_goes_on_just_before_it_is_interrupted_is_cancelled() -> None:
    holding, gate = gevent.event.Event(), gevent.event.Event()

    async def hold() -> None:
        holding.set()
        gate.wait()
        await wait_forever()

    waiting = gevent.spawn(run_coroutine, hold())
    assert holding.wait(5)
    waiting.kill(block=False)
    gate.set()
    waiting.join(timeout=5)
    assert isinstance(waiting.value, gevent.GreenletExit)


def test_what_is_asked_of_the_loop_while_a_step_holds_it_is_done_afterwards() -> None:
    holding, gate = gevent.event.Event(), gevent.event.Event()
    done: list[str] = []

    async def hold() -> None:
        hub_loop().call_soon(done.append, "by the step")
        holding.set()
        gate.wait()

    waiting = gevent.spawn(run_coroutine, hold())
    assert holding.wait(5)
    hub_loop().call_soon(done.append, "by another greenlet")
    NativeThread(hub_loop().call_soon_threadsafe, done.append, "by another thread").wait()
    gevent.sleep(0.01)  # the hub has looked, and found the loop held
    assert done == []
    gate.set()
    waiting.get(timeout=5)
    eventually(lambda: len(done) == 3)
    assert done == ["by the step", "by another greenlet", "by another thread"]


def test_many_holding_coroutines_take_turns() -> None:
    lock = gevent.lock.RLock()
    running = 0

    async def hold() -> None:
        nonlocal running
        for _ in range(3):
            with lock:
                running += 1
                gevent.sleep(0.001)
                assert running == 1
                running -= 1
            await asyncio.sleep(0)

    gevent.joinall([gevent.spawn(run_coroutine, hold()) for _ in range(20)], raise_error=True)


@pytest.mark.logs_errors
def test_a_gevent_timeout_around_an_await_is_reported_and_harmless(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def misuse() -> str:
        with gevent.Timeout(0.005):
            await asyncio.sleep(0.02)
        return "went on"

    assert run_coroutine(misuse()) == "went on"
    assert "Timeout" in caplog.text


# KeyboardInterrupt and SystemExit


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_coroutine_is_raised_by_its_waiter_alone(
    kind: type[BaseException],
) -> None:
    async def interrupt() -> None:
        await asyncio.sleep(0)
        raise kind

    async def await_it() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(interrupt())
            group.create_task(wait_forever())

    def run(coroutine: Any) -> str:
        with pytest.raises(kind):
            run_coroutine(coroutine)
        return "raised"

    assert gevent.spawn(run, interrupt()).get(timeout=5) == "raised"
    assert gevent.spawn(run, await_it()).get(timeout=5) == "raised"
    # This is the main greenlet, and nothing was thrown into it.
    gevent.sleep(0.2)
    assert run_coroutine(give("still works")) == "still works"


def test_an_interrupt_in_a_task_nobody_waits_for_is_raised_in_the_main_greenlet() -> None:
    async def interrupt() -> None:
        await asyncio.sleep(0)
        raise KeyboardInterrupt

    async def main() -> asyncio.Task[None]:
        return asyncio.create_task(interrupt())

    background = run_coroutine(main())
    with pytest.raises(KeyboardInterrupt):
        gevent.sleep(5)
    assert isinstance(background.exception(), KeyboardInterrupt)
    assert run_coroutine(give("still works")) == "still works"


# Threads


def test_each_thread_with_a_hub_has_a_loop_of_its_own() -> None:
    def run() -> tuple[object, object]:
        async def main() -> tuple[object, object]:
            await asyncio.sleep(0.01)
            return asyncio.get_running_loop(), None

        return run_coroutine(main())

    threads = [NativeThread(run) for _ in range(2)]
    loops = [thread.wait()[0] for thread in threads]
    assert len({*loops, hub_loop()}) == 3
    eventually(lambda: all(loop.is_closed() for loop in loops))  # type: ignore[attr-defined]


def test_a_call_from_another_thread_is_noticed_at_once() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        future = loop.create_future()

        def call() -> None:
            time.sleep(0.02)
            loop.call_soon_threadsafe(future.set_result, time.monotonic())

        thread = NativeThread(call)
        sent = await future
        noticed: float = time.monotonic() - sent
        thread.join()
        return noticed

    assert min(run_coroutine(main()) for _ in range(5)) < 0.5
