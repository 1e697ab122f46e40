"""The testing help that users get (`psofa_gevent.testing`), and that of our own tests."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import signal
import socket
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import gevent
import gevent.event
import gevent.socket
import pytest
from gevent import monkey

from helpers import (
    PORTS,
    NativeThread,
    ScriptedServer,
    accepts_connections,
    free_port,
    python_process,
    run_python,
    stalled_peer,
    wait_until_accepting,
)
from psofa_gevent import PsCallback, PsCloseReason, PsServer, PsSocketAddressFamily
from psofa_gevent.net.sockopts import reset
from psofa_gevent.testing import (
    ClientFactory,
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    connected_session,
    eventually,
    serving,
)

_SystemSocket: type[socket.socket] = monkey.get_original("socket", "socket")
SHORT = 0.05
"""Seconds: long enough for a step that must fail by its timeout."""


@pytest.fixture
def pair() -> Iterator[tuple[ScriptedClient, ScriptedClient]]:
    """Two scripts over one TCP connection: (client's end, server's end)."""
    with ScriptedServer() as server, ScriptedClient(server.address) as client:
        yield client, server.accept()


Pair = tuple[ScriptedClient, ScriptedClient]


# eventually


def test_eventually_returns_what_the_condition_returned() -> None:
    answers = iter([None, 0, "", "here"])
    assert eventually(lambda: next(answers)) == "here"


def test_eventually_lets_other_greenlets_run() -> None:
    happened = gevent.event.Event()
    gevent.spawn_later(0.01, happened.set)
    eventually(happened.is_set)


def test_eventually_fails_with_its_message() -> None:
    with pytest.raises(AssertionError, match=r"no luck \(waited 0\.05 s\)"):
        eventually(lambda: False, SHORT, "no luck")


def test_eventually_passes_on_what_the_condition_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        eventually(lambda: 1 / 0)


# ScriptedClient


def test_expect_reads_exactly_its_bytes_over_any_number_of_reads(pair: Pair) -> None:
    client, peer = pair
    peer.send("one")
    sender = gevent.spawn_later(0.01, peer.send, b" two three")
    client.expect("one two")
    client.expect(b" three")
    sender.get()


def test_text_is_sent_and_expected_as_utf_8(pair: Pair) -> None:
    client, peer = pair
    client.send("Grüße")
    peer.expect("Grüße")
    client.send("€")
    assert peer.receive(3) == b"\xe2\x82\xac"


def test_expect_fails_at_the_first_wrong_byte_and_shows_both(pair: Pair) -> None:
    client, peer = pair
    peer.send("hullo")
    began = time.monotonic()
    with pytest.raises(AssertionError, match="expected b'hello, world', got b'hullo'"):
        client.expect("hello, world")
    assert time.monotonic() - began < client.timeout


def test_expect_fails_when_the_bytes_end_early(pair: Pair) -> None:
    client, peer = pair
    peer.send("hel")
    peer.eof()
    with pytest.raises(AssertionError, match="expected b'hello', got b'hel' and then EOF"):
        client.expect("hello")


def test_expect_fails_when_the_connection_is_reset(pair: Pair) -> None:
    client, peer = pair
    peer.reset()
    with pytest.raises(AssertionError, match="expected b'hello', got nothing and then a reset"):
        client.expect("hello")


def test_expect_fails_at_its_deadline_with_what_came(pair: Pair) -> None:
    client, peer = pair
    client.timeout = SHORT
    peer.send("hel")
    with pytest.raises(TimeoutError, match=r"got b'hel' and then nothing within 0\.05 s"):
        client.expect("hello")


def test_a_long_message_is_cut_in_the_error(pair: Pair) -> None:
    client, peer = pair
    peer.send(b"y")
    with pytest.raises(AssertionError, match=r"x'… \(100000 bytes\), got b'y'") as info:
        client.expect(b"x" * 100_000)
    assert len(str(info.value)) < 300


def test_bytes_that_came_before_the_deadline_count_after_it(pair: Pair) -> None:
    client, peer = pair
    peer.send("x" * 10)
    client.timeout = 0.0
    eventually(lambda: client.socket.recv(10, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    client.expect("x" * 10)


def test_receive_returns_the_count_asked_for(pair: Pair) -> None:
    client, peer = pair
    peer.send("abcdef")
    assert client.receive(4) == b"abcd"
    assert client.receive(2) == b"ef"
    peer.send("xy")
    peer.eof()
    with pytest.raises(AssertionError, match="expected 3 bytes, got b'xy' and then EOF"):
        client.receive(3)


def test_receive_until_eof_returns_all_and_eof_closes_one_direction_only(pair: Pair) -> None:
    client, peer = pair
    data = os.urandom(300_000)
    client.eof()
    peer.expect_eof()
    sender = gevent.spawn(peer.send, data)
    sender.link(lambda _: peer.eof())
    assert client.receive_until_eof() == data
    sender.get()


def test_receive_until_eof_fails_at_its_deadline(pair: Pair) -> None:
    client, peer = pair
    peer.send("open end")
    client.timeout = SHORT
    with pytest.raises(TimeoutError, match="expected EOF in the end, got b'open end'"):
        client.receive_until_eof()


def test_expect_eof_fails_on_bytes_and_on_a_reset(pair: Pair) -> None:
    client, peer = pair
    peer.send("one more")
    with pytest.raises(AssertionError, match="expected EOF, got b'one more'"):
        client.expect_eof()
    peer.reset()
    with pytest.raises(AssertionError, match="expected EOF, got nothing and then a reset"):
        client.expect_eof()


def test_expect_reset_takes_a_reset_after_bytes(pair: Pair) -> None:
    client, peer = pair
    peer.send("last words")
    peer.reset()
    client.expect_reset()


def test_expect_reset_takes_a_reset_that_a_send_met_first(pair: Pair) -> None:
    client, peer = pair
    peer.reset()
    with pytest.raises(ConnectionError):
        eventually(lambda: client.send("x"))
    client.expect_reset()
    with pytest.raises(AssertionError, match="then a reset"):
        client.expect_eof()


def test_expect_reset_fails_on_eof(pair: Pair) -> None:
    client, peer = pair
    peer.send("bye")
    peer.close()
    with pytest.raises(AssertionError, match="expected a reset, got b'bye' and then EOF"):
        client.expect_reset()


def test_expect_nothing_tells_silence_from_bytes_eof_and_reset(pair: Pair) -> None:
    client, peer = pair
    client.expect_nothing(SHORT)
    peer.send("psst")
    with pytest.raises(AssertionError, match=r"expected nothing for 0\.05 s, got b'psst'"):
        client.expect_nothing(SHORT)
    peer.eof()
    with pytest.raises(AssertionError, match="got EOF"):
        client.expect_nothing(SHORT)
    client.reset()
    with pytest.raises(AssertionError, match="got a reset"):
        peer.expect_nothing(SHORT)


def test_send_fails_at_its_deadline_when_the_peer_does_not_read(pair: Pair) -> None:
    client, _peer = pair
    client.timeout = SHORT
    with pytest.raises(TimeoutError, match=r"not all of it was taken within 0\.05 s"):
        client.send(bytes(50_000_000))


def test_endpoints_are_those_of_the_connection_also_after_the_close(pair: Pair) -> None:
    client, peer = pair
    address = client.socket.getsockname()
    assert client.local_endpoint == address == peer.socket.getpeername()
    client.close()
    assert client.local_endpoint == address
    assert str(address) in repr(client)


def test_a_refused_connection_raises_and_leaves_no_socket() -> None:
    with pytest.raises(ConnectionRefusedError):
        ScriptedClient(("127.0.0.1", free_port()))


@pytest.mark.parametrize("sends_eof", [False, True])
def test_a_peer_that_resets_before_connect_has_returned_has_been_connected(
    *, sends_eof: bool
) -> None:
    with _SystemSocket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def accept_and_reset() -> None:
            # Blocks the hub, so connect(2) has been called when this goes on, and has not returned.
            accepted, _ = listening.accept()
            if sends_eof:
                accepted.shutdown(socket.SHUT_WR)
            reset(accepted)

        for step in (ScriptedClient.expect_reset, _expect_eof_fails, _expect_nothing_fails):
            resetting = gevent.spawn(accept_and_reset)
            with ScriptedClient(listening.getsockname()) as client:
                step(client)
            resetting.get()


def _expect_eof_fails(client: ScriptedClient) -> None:
    with pytest.raises(AssertionError, match="and then a reset"):
        client.expect_eof()


def _expect_nothing_fails(client: ScriptedClient) -> None:
    with pytest.raises(AssertionError, match="got a reset"):
        client.expect_nothing(SHORT)


def test_a_server_on_a_wildcard_address_is_reached_at_loopback() -> None:
    with ScriptedServer("0.0.0.0") as server, ScriptedClient(server.address) as client:
        assert client.socket.getpeername() == ("127.0.0.1", server.port)


def test_an_ipv6_address_is_taken_as_the_server_reports_it() -> None:
    with ScriptedServer("::1") as server, ScriptedClient(server.address) as client:
        client.send("six")
        server.accept().expect("six")


def test_a_unix_socket_pair_refuses_reset_and_says_what_to_use() -> None:
    near, far = gevent.socket.socketpair()
    with ScriptedClient.from_socket(near) as client, ScriptedClient.from_socket(far) as peer:
        client.send("over a pair")
        peer.expect("over a pair")
        with pytest.raises(ValueError, match=r"needs a TCP connection.*serving\(\)"):
            client.reset()


def test_waiting_for_one_connection_holds_up_no_other_greenlet(pair: Pair) -> None:
    client, peer = pair
    waiting = gevent.spawn(client.receive, 5)
    gevent.spawn(peer.send, "hello").get()
    assert waiting.get() == b"hello"


# RecordingCallback, serving and the fixtures


@pytest.mark.parametrize("use_async_callback", [False, True])
def test_recording_callback_records_the_life_of_a_session(
    ps_server: ServerFactory, ps_client: ClientFactory, use_async_callback: bool
) -> None:
    callback = RecordingCallback(bytes.upper, use_async_callback=use_async_callback)
    server = ps_server(callback)
    client = ps_client(server)
    client.send("hello")
    client.expect("HELLO")
    client.eof()
    [closed] = callback.wait_for("on_close")
    server.shutdown()
    assert [event.name for event in callback.events] == [
        "on_start",
        "on_open",
        "on_message",
        "on_close",
        "on_stop",
    ]
    [started], [opened] = callback.named("on_start"), callback.named("on_open")
    assert started == ("on_start", None, server)
    assert callback.named("on_stop") == [("on_stop", None, server)]
    assert closed == ("on_close", opened.session, PsCloseReason.PEER_CLOSE)
    assert callback.received() == b"hello"


@pytest.mark.parametrize("use_async_callback", [False, True])
def test_recording_callback_records_a_half_close(use_async_callback: bool) -> None:
    callback = RecordingCallback(use_async_callback=use_async_callback)
    with connected_session(callback, allow_half_open=True) as connected:
        connected.peer.eof()
        assert callback.wait_for("on_eof") == [("on_eof", connected.session, None)]


def test_recording_callback_tells_sessions_apart(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    callback = RecordingCallback(lambda message: message)
    server = ps_server(callback)
    first, second = ps_client(server), ps_client(server)
    first.send("one")
    first.expect("one")
    second.send("two")
    second.expect("two")
    for client, message in ((first, b"one"), (second, b"two")):
        [session] = [s for s in server.sessions if s.remote_endpoint == client.local_endpoint]
        assert callback.received(session) == message
        assert len(callback.wait_for("on_message", session=session)) == 1


def test_wait_for_fails_with_what_was_called_instead() -> None:
    callback = RecordingCallback()
    with connected_session(callback):
        callback.wait_for("on_open")
        with pytest.raises(AssertionError, match=r"2 calls of on_message .*'on_open'\]"):
            callback.wait_for("on_message", 2, timeout=SHORT)


def test_serving_gives_a_started_server_and_shuts_it_down() -> None:
    callback = RecordingCallback()
    with serving(callback) as server:
        assert server.address[0] == "127.0.0.1"
        with ScriptedClient(server.address) as client:
            callback.wait_for("on_open")
            address = server.address
            server.shutdown()
            client.expect_eof()
    assert not server.started
    assert not accepts_connections(address)
    assert [event.value for event in callback.named("on_close")] == [PsCloseReason.SHUTDOWN]


def test_serving_takes_the_settings_of_the_server() -> None:
    callback = RecordingCallback()
    with (
        serving(
            callback, socket_address_family=PsSocketAddressFamily.IPV6, read_buffer_size=2
        ) as server,
        ScriptedClient(server.address) as client,
    ):
        assert server.address[0] == "::1"
        client.send("abcd")
        messages = callback.wait_for("on_message", 2)
        assert [event.value for event in messages] == [b"ab", b"cd"]


def test_serving_shuts_down_when_the_test_fails() -> None:
    with pytest.raises(ZeroDivisionError), serving(RecordingCallback()) as server:
        raise ZeroDivisionError
    assert not server.started


def test_serving_fails_when_a_session_outlives_the_shutdown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(PsServer, "get_session_count", lambda _server: 2)
    with pytest.raises(AssertionError, match="2 sessions are left"), serving(PsCallback()):
        pass


def test_ps_server_fixture_gives_any_number_of_servers(
    ps_server: ServerFactory, ps_client: ClientFactory
) -> None:
    servers = [ps_server(RecordingCallback(bytes.upper)) for _ in range(3)]
    assert len({server.address for server in servers}) == 3
    for server in servers:
        assert isinstance(server, PsServer)
        client = ps_client(server.address, timeout=4.0)
        assert client.timeout == 4.0
        client.send("x")
        client.expect("X")


# connected_session


@pytest.mark.parametrize("use_async_callback", [False, True])
def test_connected_session_runs_a_callback_without_a_port(use_async_callback: bool) -> None:
    callback = RecordingCallback(bytes.upper, use_async_callback=use_async_callback)
    with connected_session(callback) as connected:
        connected.peer.send("hello")
        connected.peer.expect("HELLO")
        connected.session.send("unasked")
        connected.peer.expect("unasked")
    assert not connected.session.is_open
    assert callback.named("on_close") == [("on_close", connected.session, PsCloseReason.SELF_CLOSE)]
    assert callback.events[-1].name == "on_stop"


def test_connected_session_ends_by_the_peers_script() -> None:
    callback = RecordingCallback()
    with connected_session(callback) as connected:
        connected.peer.send("last words")
        connected.peer.close()
        [closed] = callback.wait_for("on_close")
        assert closed.value is PsCloseReason.PEER_CLOSE
        assert callback.received() == b"last words"


def test_connected_session_takes_session_settings() -> None:
    callback = RecordingCallback()
    with connected_session(callback, idle_milliseconds=1):
        [closed] = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.TIMEOUT


def test_connected_session_does_not_linger_for_a_peer_that_reads_nothing() -> None:
    callback = RecordingCallback()
    began = time.monotonic()
    with connected_session(callback, linger_timeout=30.0) as connected:
        connected.session.send("never read")
    assert time.monotonic() - began < 10.0
    assert [event.value for event in callback.named("on_close")] == [PsCloseReason.SELF_CLOSE]


def test_connected_session_closes_everything_when_the_test_fails() -> None:
    callback = RecordingCallback()
    with pytest.raises(ZeroDivisionError), connected_session(callback) as connected:
        raise ZeroDivisionError
    assert len(callback.named("on_close")) == 1
    assert connected.peer.socket.fileno() == -1


def test_connected_session_refuses_a_bad_setting_and_leaves_no_socket() -> None:
    refused = connected_session(PsCallback(), divide=0)
    with pytest.raises(ValueError, match="divide"):
        refused.__enter__()


# Without pytest


def test_only_the_fixtures_need_pytest() -> None:
    program = """
        import sys
        sys.modules["pytest"] = None
        from psofa_gevent import PsCallback
        from psofa_gevent.testing import RecordingCallback, connected_session
        with connected_session(RecordingCallback(bytes.upper)) as connected:
            connected.peer.send("a")
            connected.peer.expect("A")
        try:
            from psofa_gevent.testing import ps_server
        except ImportError as error:
            print(error)
    """
    process = run_python(program)
    assert (process.returncode, process.stderr) == (0, "")
    assert "the fixture ps_server needs pytest" in process.stdout
    assert "psofa_gevent[testing]" in process.stdout


def test_importing_the_testing_help_patches_nothing_and_imports_no_pytest() -> None:
    process = run_python("""
        import sys
        import psofa_gevent.testing
        from gevent import monkey
        print(monkey.is_anything_patched(), "pytest" in sys.modules)
    """)
    assert process.stdout == "False False\n"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    module = importlib.import_module("psofa_gevent.testing")
    assert not hasattr(module, "ps_sever")


def test_the_fixtures_work_in_a_users_conftest(tmp_path: Path) -> None:
    files = {
        "conftest.py": """
            from psofa_gevent.testing import ps_client, ps_server
        """,
        "test_theirs.py": """
            import pytest
            from psofa_gevent import PsCallback

            class Echo(PsCallback):
                def on_message(self, session, message):
                    session.send(message)

            def test_echo(ps_server, ps_client):
                client = ps_client(ps_server(Echo()))
                client.send("hello")
                client.expect("hello")
        """,
    }
    write_files(tmp_path, files)
    process = run_pytest(tmp_path)
    assert process.returncode == 0, process.stdout


# Our conftest


LEAVES_NOTHING = """
    import asyncio
    import logging
    import time
    import gevent
    import pytest
    from gevent import socket
    from psofa_gevent import run_coroutine

    def test_clean():
        gevent.spawn(gevent.sleep, 0.01)
        pair = socket.socketpair()
        gevent.spawn_later(0.01, lambda: [end.close() for end in pair])

    def test_clean_but_for_what_the_asyncio_loop_of_the_hub_keeps():
        async def use_a_thread():
            await asyncio.to_thread(time.sleep, 0.01)

        run_coroutine(use_a_thread())

    @pytest.mark.logs_errors
    @pytest.mark.hub_errors
    def test_clean_because_marked():
        logging.getLogger("psofa_gevent.session.session").error("as expected")
        gevent.spawn(lambda: 1 / 0).join()
"""

LEAVES_SOMETHING = """
    import logging
    import gevent
    import pytest
    from gevent import get_hub, socket

    kept = []

    def test_leaves_a_greenlet():
        kept.append(gevent.spawn(gevent.event.Event().wait))

    def test_leaves_a_socket():
        kept.append(socket.socketpair())

    def test_leaves_a_file():
        kept.append(open(__file__))

    @pytest.mark.skipif("libuv" in type(get_hub().loop).__module__, reason="not counted there")
    def test_leaves_a_timer():
        kept.append(get_hub().loop.timer(100.0))
        kept[-1].start(print)

    def test_logs_an_error():
        logging.getLogger("psofa_gevent.session.session").error("nobody expects this")

    def test_makes_the_hub_print():
        gevent.spawn(lambda: 1 / 0).join()

    @pytest.mark.deadline(0.05)
    def test_waits_too_long():
        gevent.sleep(30)
"""


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, source in files.items():
        (folder / name).write_text(textwrap.dedent(source), encoding="utf-8")


def run_pytest(folder: Path) -> CompletedProcess[str]:
    """Run the tests in `folder`, which know nothing of this project's configuration."""
    write_files(folder, {"pytest.ini": "[pytest]"})
    program = """
        import sys
        import pytest
        sys.exit(pytest.main([sys.argv[1], "-rA", "-p", "no:cacheprovider"]))
    """
    # None of the plugins that happen to be installed: they take longer than the tests.
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return run_python(program, str(folder), environment=environment)


@pytest.fixture
def folder_with_our_conftest(tmp_path: Path) -> Path:
    conftest = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    impatient = conftest.replace("GRACE_SECONDS = 2.0", "GRACE_SECONDS = 0.1")
    write_files(tmp_path, {"conftest.py": impatient})
    return tmp_path


def test_a_clean_test_passes_our_leak_check(folder_with_our_conftest: Path) -> None:
    write_files(folder_with_our_conftest, {"test_them.py": LEAVES_NOTHING})
    process = run_pytest(folder_with_our_conftest)
    assert process.returncode == 0, process.stdout
    assert process.stderr == ""


def test_each_thing_left_behind_fails_its_test_and_no_other(folder_with_our_conftest: Path) -> None:
    write_files(
        folder_with_our_conftest,
        {
            "test_a.py": LEAVES_SOMETHING,
            "test_b.py": LEAVES_NOTHING,
        },
    )
    output = run_pytest(folder_with_our_conftest).stdout
    expected = {
        "test_leaves_a_greenlet": "greenlet <Greenlet",
        "test_leaves_a_socket": "socket",
        "test_leaves_a_file": "file",
        "test_leaves_a_timer": "active watchers of the hub: 1 more",
        "test_logs_an_error": "ERROR on psofa_gevent.session.session: nobody expects this",
        "test_makes_the_hub_print": "ZeroDivisionError",
    }
    if "libuv" in type(gevent.get_hub().loop).__module__:
        del expected["test_leaves_a_timer"]
    errors = dict(re.findall(r"_ ERROR at teardown of (\w+) _+\n(.*?)\n(?=_|=)", output, re.DOTALL))
    assert errors.keys() == expected.keys(), output
    for name, text in expected.items():
        assert text in errors[name]
    assert "the test did not end within 0.05 s" in output
    assert re.search("^=.* 1 failed, ", output, re.MULTILINE), output


# Our helpers


def test_run_python_ends_a_program_at_its_deadline(tmp_path: Path) -> None:
    # The deadline comes when the program has printed, however long Python takes to begin.
    printed = tmp_path / "printed"
    source = "import sys, time; print('on', flush=True); open(sys.argv[1], 'x'); time.sleep(100)"
    for timeout in (1.0, 2.0, 4.0, 8.0, 16.0):
        with pytest.raises(AssertionError, match=rf"did not end within {timeout} s") as caught:
            run_python(source, str(printed), timeout=timeout)
        if printed.exists():
            break
    assert re.search(r"it printed b?'on", str(caught.value))


def test_run_python_limits_the_descriptors_of_the_program() -> None:
    process = run_python(
        "import resource, sys; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], sys.argv[1])",
        "argument",
        descriptor_limit=77,
    )
    assert process.stdout == "77 argument\n"


def test_python_process_is_talked_to_and_ended() -> None:
    source = """if True:
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print("ready to wait")
        while True:
            signal.pause()
    """
    with python_process("-c", source) as process:
        assert process.expect_line("ready") == "ready to wait"
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 7
    with python_process("-c", source) as process:
        process.expect_line("ready")
    assert process.returncode == -signal.SIGKILL


def test_python_process_without_the_line_fails() -> None:
    with (
        python_process("-c", "print('something else')") as process,
        pytest.raises(AssertionError, match=r"no line with 'this' .*printed:\nsomething else"),
    ):
        process.expect_line("this")


def test_native_thread_runs_beside_the_blocked_hub() -> None:
    main = monkey.get_original("_thread", "get_ident")()
    thread = NativeThread(monkey.get_original("_thread", "get_ident"))
    assert thread.join() != main
    assert thread.wait() == thread.join()
    assert thread.ended


def test_native_thread_raises_in_the_joiner_what_it_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        NativeThread(lambda: 1 / 0).join()


def test_native_thread_that_does_not_end_fails_the_join() -> None:
    lock = monkey.get_original("_thread", "allocate_lock")()
    with lock:
        thread = NativeThread(lambda: lock.acquire(True, 10.0))
        with pytest.raises(AssertionError, match=r"did not end within 0\.05 s"):
            thread.join(SHORT)
    assert thread.wait()
    lock.release()


def test_native_thread_may_wait_on_a_hub_of_its_own() -> None:
    NativeThread(gevent.sleep, 0.01).join()


def test_stalled_peer_makes_a_sender_wait() -> None:
    with ScriptedServer() as server, stalled_peer(server.address):
        sender = server.accept(timeout=0.2)
        with pytest.raises(TimeoutError):
            sender.send(bytes(10_000_000))


def test_wait_until_accepting_waits_for_a_listener() -> None:
    address = ("127.0.0.1", free_port())
    with pytest.raises(AssertionError, match="nobody accepts"):
        wait_until_accepting(address, SHORT)
    with ScriptedServer() as server:
        wait_until_accepting(server.address)


def test_no_free_port_is_given_twice_nor_one_that_the_system_gives_away() -> None:
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
    with gevent.socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        assert sock.getsockname()[1] not in PORTS
    assert set(ports) <= set(PORTS)


def test_a_free_port_is_none_on_which_somebody_listens() -> None:
    following = free_port() + 1
    with gevent.socket.socket() as taken:
        with contextlib.suppress(OSError):  # somebody else has it
            taken.bind(("127.0.0.1", following))
            taken.listen()
        assert free_port() != following
