"""Forks: who has accepted or connected serves alone, and a child process lets go of all of it.

Each test is a program of its own that forks, for real: pytest's own process has too much to share.
"""

from __future__ import annotations

import signal
import sys
import textwrap
from pathlib import Path

import gevent
import pytest

from forks import NEEDS_PROC, PATCHED, Peer, run, serving_program
from helpers import LOOPBACK
from psofa_gevent.testing import eventually

WAYS = {
    "os.fork": "pid = fork(job)",
    "gevent.os.fork": "pid = fork(job, gevent.os.fork)",
    "multiprocessing": """
process = multiprocessing.get_context("fork").Process(target=job)
process.start()
pid = None
""",
    "ProcessPoolExecutor": """
from concurrent.futures import ProcessPoolExecutor
pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))
future = pool.submit(job)
pid = None
""",
}


@PATCHED
@pytest.mark.parametrize("way", WAYS)
def test_no_message_is_lost_to_a_job_that_waits(way: str, patched: str) -> None:
    program = """
        class Forks(Who):
            def on_message(self, session, message):
                if message == b"fork":
                    asked.set()
                elif message == b"end":
                    end.set()
                else:
                    super().on_message(session, message)

        def job():
            for _ in range(20):
                gevent.sleep(0.05)
            say("job done")

        asked, end = gevent.event.Event(), gevent.event.Event()
        with PsServer(Forks(), host="localhost", port=0, framing=Line()) as server:
            print("address", server.address[1], PARENT, flush=True)
            asked.wait()
            WAY
            if pid is not None:
                wait(pid)
            elif "process" in globals():
                process.join()
                assert process.exitcode == 0
            else:
                future.result()
                pool.shutdown()
            say("joined")
            end.wait()
    """
    program = textwrap.dedent(program).replace(
        "    WAY", textwrap.indent(WAYS[way].strip(), "    ")
    )
    with serving_program(program, patched) as process:
        _, port, parent = process.expect_line("address").split()
        address = (LOOPBACK, int(port))
        answers: list[str] = []

        def talk(peer: Peer) -> None:
            for _ in range(40):
                answers.append(peer.ask())
                gevent.sleep(0.03)

        peers = [Peer(address, timeout=20) for _ in range(50)]
        assert {peer.line() for peer in peers} == {parent}
        talks = [gevent.spawn(talk, peer) for peer in peers]
        eventually(lambda: len(answers) > 100, 20)
        peers[0].send("fork\n")
        fresh = []
        for _ in range(20):
            fresh.append(Peer(address, timeout=20))
            gevent.sleep(0.02)
        assert {peer.line() for peer in fresh} == {parent}
        gevent.joinall(talks, raise_error=True)
        assert answers == [parent] * 2_000
        process.expect_line("joined")
        assert {peer.ask() for peer in peers + fresh} == {parent}
        peers[0].send("end\n")
        for peer in peers + fresh:
            peer.expect_eof()
            peer.close()
        assert process.wait() == 0
        assert process.lines[1:] == ["job done", "joined"]


@PATCHED
@pytest.mark.parametrize("way", ["os.fork", "gevent.os.fork"])
@pytest.mark.parametrize("where", ["main", "greenlet"])
def test_servers_clients_and_coroutines_work_in_a_child(way: str, patched: str, where: str) -> None:
    program = """
        class Async(PsCallback):
            use_async_callback = True
            async def on_message_async(self, session, message):
                await asyncio.sleep(0.01)
                await asyncio.to_thread(int)
                await session.send_async(message)

        def serve_and_connect():
            for callback in (Async(), RecordingCallback(lambda message: message)):
                server = PsServer(callback, host="localhost", port=0, framing=Line())
                with gevent.Timeout(10), server:
                    with Peer((HOST, server.address[1])) as peer:
                        peer.send("hello\\n")
                        peer.expect("hello\\n")
                    answers = RecordingCallback()
                    port = server.address[1]
                    with PsClient(answers, "localhost", port, framing=Line()) as client:
                        client.session.send("again")
                        assert answers.wait_for("on_message")[0].value == b"again"
                    with PsMultiClient(answers) as bundle:
                        assert bundle.connect("localhost", port).session.is_open
            assert run_coroutine(asyncio.sleep(0.01, 5)) == 5

        serve_and_connect()  # names were resolved, coroutines have run
        with PsServer(PsCallback(), host=HOST, port=0) as server:
            with PsClient(PsCallback(), "localhost", server.address[1]) as client:
                def forks():
                    def in_child():
                        serve_and_connect()
                        wait(fork(serve_and_connect))  # and in a child of the child
                    wait(fork(in_child, eval(sys.argv[1])))
                if sys.argv[2] == "main":
                    forks()
                else:
                    gevent.spawn(forks).get()
                assert client.session.is_open
        serve_and_connect()
    """
    assert run(program, patched, way, where) == []


@PATCHED
def test_in_a_child_owners_look_stopped_and_sessions_closed(patched: str) -> None:
    program = """
        group = PsGroup("all")
        requester = PsRequester()

        class Joins(PsCallback):
            def on_open(self, session):
                group.join(session)
                server.group("own").join(session)
                if server.find("key") is None:
                    server.bind(session, "key")

        server = PsServer(Joins(), host=HOST, port=0, max_sessions_per_peer=3)
        server.start()
        address = server.address
        own = server.group("own")
        client = PsClient(PsCallback(), HOST, address[1])
        client.connect()
        bundle = PsMultiClient(PsCallback(), reconnect=True)
        bundle.init_bundle()
        connection = bundle.connect(HOST, address[1])
        staying = PsClient(PsCallback(), HOST, address[1], reconnect=True)
        staying.connect()
        eventually(lambda: len(group) == 3)
        sessions = list(group) + [client.session, connection.session, staying.session]

        @gevent.spawn
        def ask():
            with contextlib.suppress(PsRequestClosedError):
                requester.request(client.session, "?", timeout=None)

        eventually(lambda: requester.get_request_count(client.session) == 1)
        mine = client.session

        def child():
            began = gevent.get_hub().loop.now()
            for owner in (server, client, bundle, staying):
                assert not owner.started
                assert owner.sessions == [] and owner.get_session_count() == 0
                owner.broadcast("x")
                assert owner.find("key") is None
                assert owner.get_session(mine.connection_id) is None
            assert len(group) == len(own) == 0
            assert server.address == address  # where its parent has it
            for session in sessions:
                assert not session.is_open
                assert session.post("x") is False and session.pending_bytes == 0
                session.close()
                session.abort()
                session.send_eof()
                for send in (session.send, session.send_file):
                    try:
                        send(b"x" if send == session.send else __import__("io").BytesIO(b"x"))
                    except PsSendError:
                        pass
                    else:
                        raise AssertionError("sent")
            assert requester.get_request_count(mine) == 0
            assert client.session is None
            for wait_connected in (staying.wait_connected, connection.wait_connected):
                try:
                    wait_connected(timeout=3)
                except PsError as exc:
                    print(exc)
            try:
                requester.request(mine, "?")
            except PsRequestClosedError:
                pass
            server.stop_accepting()
            server.resume_accepting()
            for end in (server.shutdown, client.disconnect, bundle.destroy_bundle):
                with gevent.Timeout(2):
                    end()
            assert server.wait_for() is True
            gevent.sleep(0.05)
            # And they may be used anew.
            with client:
                client.session.send("from the child")
            staying.connect()
            staying.disconnect()
            bundle.init_bundle()
            bundle.connect(HOST, address[1])
            bundle.destroy_bundle()

        wait(fork(child))
        assert all(session.is_open for session in sessions)
        assert requester.get_request_count(mine) == 1 and len(own) == len(group) == 3
        assert server.find("key") is not None
        for end in (server.shutdown, client.disconnect, bundle.destroy_bundle, staying.disconnect):
            end()
    """
    lines = run(program, patched)
    assert len(lines) == 2, lines
    assert all("which has forked" in line for line in lines), lines


@NEEDS_PROC
@PATCHED
def test_a_child_has_no_descriptor_of_its_parents_in_whatever_phase(
    patched: str, tmp_path: Path
) -> None:
    program = """
        import ssl, trustme
        from helpers import black_hole, stalled_peer

        folder = sys.argv[1]
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trustme.CA().issue_cert("localhost").configure_cert(context)
        notified = gevent.socket.socket(gevent.socket.AF_UNIX, gevent.socket.SOCK_DGRAM)
        notified.bind(folder + "/notify")
        os.environ["NOTIFY_SOCKET"] = folder + "/notify"
        big = folder + "/big"
        with open(big, "wb") as file:
            file.truncate(64 << 20)
        own = listening()
        silent = listening()

        class Sends(PsCallback):
            def on_open(self, session):
                session.send_file(big, timeout=None)

        class Waits(PsCallback):
            def on_message(self, session, message):
                gevent.sleep(60)
        keep = contextlib.ExitStack()
        hole = keep.enter_context(black_hole())
        mine = set(sockets().values()) | {None}
        servers = [
            PsServer(Waits(), listener=[(HOST, 0), "unix:" + folder + "/sock", own]),
            PsServer(PsCallback(), host=HOST, port=0, ssl_context=context),
            PsServer(PsCallback(), host=HOST, port=0, proxy_protocol=True),
            PsServer(PsCallback(), host=HOST, port=0, max_sessions_per_peer=1, farewell="bye"),
            PsServer(Sends(), host=HOST, port=0),
            PsServer(PsCallback(), host=HOST, port=0, linger_timeout=30),
        ]
        for server in servers:
            server.start()
        told = PsServer(PsCallback(), host=HOST, port=0)
        telling = gevent.spawn(told.serve_forever)
        notified.recv(100)
        before = set(sockets().values())
        peers = [Peer(server.address) for server in servers for _ in range(2)]
        peers[0].send("x")
        peers += [stalled_peer(servers[4].address), stalled_peer(servers[5].address)]
        theirs = {peer.socket.fileno() for peer in peers}
        eventually(lambda: [server.get_session_count() for server in servers] == [2, 2, 2, 1, 3, 3])
        for session in servers[5].sessions:
            session.post(bytes(8 << 20))
            session.close()  # and lingers
        client = PsClient(PsCallback(), HOST, servers[0].address[1])
        client.connect()
        attempts = [
            PsClient(PsCallback(), *hole),
            PsClient(PsCallback(), HOST, silent.getsockname()[1], ssl_context=True),
            PsClient(PsCallback(), *hole, reconnect=True),
        ]
        def attempt(client):
            with contextlib.suppress(PsError):
                client.connect(timeout=20)
        attempting = [gevent.spawn(attempt, client) for client in attempts]
        accepted, _ = silent.accept()
        theirs.add(accepted.fileno())
        # Under way, one of them in the TLS handshake.
        eventually(lambda: all(
            connector is not None and connector._connecting is not None
            for client in attempts for connector in client._connectors or [None]
        ))

        def child():
            files = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                     if os.path.exists(f"/proc/self/fd/{name}")]
            assert big not in files
            left = {fd: inode for fd, inode in sockets().items()
                    if inode not in mine and fd not in theirs}
            assert not left, [(fd, gevent.socket.socket(fileno=fd)) for fd in left]
            assert os.path.exists(folder + "/sock")
            for peer in peers:
                peer.socket.close()
            gevent.sleep(0.3)
            assert os.times().user < before_fork.user + 0.25, "it spins"

        before_fork = os.times()
        wait(fork(child))
        assert len(set(sockets().values()) - mine) > 20
        os._exit(0)
    """
    # The sockets that the program itself has are no others'.
    run(program, patched, str(tmp_path))


@PATCHED
@pytest.mark.parametrize("how", ["sys.exit", "end", "collected", "killed"])
def test_no_callback_of_a_parents_session_runs_in_a_child(patched: str, how: str) -> None:
    program = """
        import atexit, weakref

        def tell(what):
            say("parent" if os.getpid() == PARENT else "child", what)

        class Sync(PsCallback):
            def on_open(self, session):
                session.spawn(self.work)
                try:
                    with contextlib.suppress(gevent.Timeout), gevent.Timeout(0.4):
                        self.work()
                    session.send("x")
                finally:
                    tell("finally")
            def work(self):
                try:
                    gevent.sleep(0.3)
                    event.wait()
                finally:
                    tell("finally")
            def on_close(self, session, reason):
                tell("on_close")
                try:
                    gevent.sleep(0.3)
                finally:
                    tell("finally")
            def on_stop(self, owner):
                tell("on_stop")

        class Async(PsCallback):
            use_async_callback = True
            async def on_open_async(self, session):
                try:
                    await asyncio.sleep(0.3)
                    await session.send_async("x")
                    await asyncio.Event().wait()
                finally:
                    tell("finally")
            async def on_close_async(self, session, reason):
                tell("on_close")

        event = gevent.event.Event()
        servers = [PsServer(callback, host=HOST, port=0, callback_timeout=limit)
                   for callback in (Sync(), Async()) for limit in (None, 0.35)]
        for server in servers:
            server.start()
        peers = [Peer(server.address) for server in servers for _ in range(3)]
        eventually(lambda: sum(len(server.sessions) for server in servers) == 12)
        peers[0].close()
        gevent.sleep(0.15)
        how = sys.argv[1]
        pid = os.fork()
        if pid == 0:
            atexit.register(tell, "exits")
            if how == "collected":
                del servers, server
                for peer in peers:
                    peer.socket = None
                gc.collect()
            event.set()
            if how == "killed":
                gevent.killall([g for g in gc.get_objects() if isinstance(g, gevent.Greenlet)],
                               block=False)
            gevent.sleep(0.8)
            gc.collect()
            if how == "sys.exit":
                sys.exit(0)
        else:
            wait(pid)
            for server in servers:
                server.shutdown(timeout=0.1)
    """
    lines = run(program, patched, how)
    assert [line for line in lines if line.startswith("child")] == ["child exits"], lines
    assert lines.count("parent on_close") == 12
    assert lines.count("parent on_stop") == 2


WHERE = {
    "on_message": "on_message",
    "on_message, async": "on_message_async",
    "on_close": "on_close",
    "work": "work",
    "a signal handler in the hub": "signal",
    "another greenlet": "greenlet",
}


@PATCHED
@pytest.mark.parametrize("then", ["goes on", "returns", "raises"])
@pytest.mark.parametrize("where", WHERE)
def test_a_child_that_is_forked_in_a_callback_goes_on_there(
    where: str, then: str, patched: str
) -> None:
    program = """
        where, then = sys.argv[1:]

        def forks():
            global pid
            if pid:
                return
            pid = os.fork()
            if pid:
                forked.set()
                return
            if then == "goes on":
                if where not in ("on_message_async", "signal"):
                    gevent.sleep(0.05)
                    event = gevent.event.Event()
                    gevent.spawn(event.set)
                    event.wait()
                    with PsServer(PsCallback(), host="localhost", port=0) as own:
                        Peer((HOST, own.address[1])).close()
                leave()
            gevent.spawn_later(0.5, leave)
            if then == "raises":
                raise ValueError("in the child")

        class Forks(Who):
            def on_message(self, session, message):
                if message == b"end":
                    end.set()
                elif where == "on_message":
                    forks()
                elif where == "work":
                    session.spawn(forks)
                elif where == "greenlet":
                    asked.set()
                super().on_message(session, message)
            def on_close(self, session, reason):
                say("on_close", os.getpid())
                if where == "on_close":
                    forks()

        class Async(PsCallback):
            use_async_callback = True
            async def on_open_async(self, session):
                await session.send_async(str(os.getpid()))
            async def on_message_async(self, session, message):
                await asyncio.sleep(0)
                if message == b"end":
                    end.set()
                else:
                    forks()
                await session.send_async(str(os.getpid()))
            async def on_close_async(self, session, reason):
                say("on_close", os.getpid())

        def forks_when_asked():
            asked.wait()
            forks()

        pid = 0
        asked, end, forked = [gevent.event.Event() for _ in range(3)]
        gevent.spawn(forks_when_asked)
        signal.signal(signal.SIGUSR1, lambda *_: forks())
        callback = Async() if where == "on_message_async" else Forks()
        server = PsServer(callback, host=HOST, port=0, framing=Line())
        server.start()
        print("address", server.address[1], PARENT, flush=True)
        forked.wait()
        try:
            wait(pid)
        except AssertionError:
            # A signal's handler may raise in the main greenlet, as ever.
            assert (where, then) == ("signal", "raises")
        say("joined")
        end.wait()
        server.shutdown()
    """
    with serving_program(program, patched, WHERE[where], then) as process:
        _, port, parent = process.expect_line("address").split()
        address = (LOOPBACK, int(port))
        peers = [Peer(address, timeout=20) for _ in range(5)]
        other = Peer(address, timeout=20)
        assert {peer.line() for peer in [*peers, other]} == {parent}
        if where == "on_close":
            other.close()
        elif "signal" in where:
            process.send_signal(signal.SIGUSR1)
        for _ in range(3):
            for peer in peers:
                peer.send("who?\nwho?\n")  # a child would have the next ones in its buffers, too
            assert [peer.line() for peer in peers + peers] == [parent] * 10
        process.expect_line("joined")
        assert {peer.ask() for peer in peers} == {parent}
        other.close()
        peers[0].send("end\n")
        assert process.wait() == 0
        closed = [line for line in process.lines if line.startswith("on_close")]
        assert closed == [f"on_close {parent}"] * 6
        for peer in peers:
            peer.close()
        # asyncio's own report: see the docstring of `psofa_gevent.hub.forking`.
        is_reported = where == "on_message, async" and sys.version_info >= (3, 14)
        if then != "raises" and not is_reported:
            assert "Traceback" not in "\n".join(process.lines)


@PATCHED
@pytest.mark.parametrize("how", ["at once", "when its turn is over"])
def test_a_child_that_is_forked_within_a_read_gets_none_of_its_other_messages(
    how: str, patched: str
) -> None:
    program = """
        class Forks(PsCallback):
            def on_message(self, session, message):
                who = "parent" if os.getpid() == PARENT else "child"
                seen.append(message)
                say(who, message.decode())
                if message == b"20":
                    pid = os.fork()
                    if pid:
                        pids.append(pid)
                    else:
                        if how != "at once":
                            monkey.get_original("time", "sleep")(0.03)
                        gevent.spawn_later(0.5, leave)

        how = sys.argv[1]
        seen, pids = [], []
        with PsServer(Forks(), host=HOST, port=0, framing=Line()) as server:
            peer = Peer(server.address)
            peer.send("".join(f"{number}\\n" for number in range(100)))
            eventually(lambda: len(seen) == 100)
            wait(*pids)
    """
    lines = run(program, patched, how)
    assert sorted(lines) == sorted(f"parent {number}" for number in range(100))


@PATCHED
def test_a_child_that_leaves_by_sys_exit_leaves_its_parents_sessions_alone(patched: str) -> None:
    program = """
        pids = []
        with PsServer(Who(), host=HOST, port=0, framing=Line()) as server:
            with PsClient(RecordingCallback(), HOST, server.address[1]) as client:
                peer = Peer(server.address)
                assert peer.who() == "parent"
                for _ in range(2):
                    pid = os.fork()
                    if pid == 0:
                        sys.exit(0)
                    pids.append(pid)
                wait(*pids)
                assert client.session.is_open
                assert peer.ask() == "parent"
                peer.close()
    """
    assert run(program, patched) == []


@PATCHED
@pytest.mark.parametrize("how", ["recv", "wait_read", "select"])
def test_a_callback_that_waits_for_a_socket_keeps_no_child_busy(patched: str, how: str) -> None:
    """Its watcher is still there, and tells again and again when the socket's peer has ended."""
    program = """
        import gevent.select
        from psofa_gevent.aio import greenlet as aio_greenlet
        from psofa_gevent.hub import greenlets as worker

        ours, theirs = gevent.socket.socketpair()

        class Waits(PsCallback):
            def on_open(self, session):
                waits.set()
                if sys.argv[1] == "recv":
                    ours.recv(10)
                elif sys.argv[1] == "wait_read":
                    gevent.socket.wait_read(ours.fileno())
                else:
                    gevent.select.select([ours], [], [])

        def child():
            rounds = 0
            check = gevent.get_hub().loop.check()
            def count():
                nonlocal rounds
                rounds += 1
            check.start(count)
            theirs.shutdown(gevent.socket.SHUT_RDWR)
            gevent.sleep(0.5)
            check.stop()
            assert rounds < 100, rounds

        waits = gevent.event.Event()
        with PsServer(Waits(), host=HOST, port=0) as server:
            peer = Peer(server.address)
            waits.wait()
            gevent.sleep(0.05)
            wait(fork(child))
            peer.close()
    """
    assert run(program, patched, how) == []


def test_a_shutdown_in_a_child_lets_go_for_good() -> None:
    program = """
        server = PsServer(Who(), host=HOST, port=0, framing=Line())
        server.start()
        def child():
            server.shutdown()
            assert server.wait_for() is True
            assert server.address == (HOST, 0)
        wait(fork(child))
        assert Peer(server.address).who() == "parent"
        server.shutdown()
    """
    assert run(program) == []


@PATCHED
def test_the_port_is_free_after_shutdown_while_a_child_lives(patched: str) -> None:
    program = """
        server = PsServer(Who(), host=HOST, port=0, framing=Line())
        server.start()
        address = server.address
        peer = Peer(address)
        assert peer.who() == "parent"
        read, write = os.pipe()
        pid = fork(lambda: os.read(read, 1))
        server.shutdown()
        peer.expect_eof()
        try:
            Peer(address)
        except ConnectionRefusedError:
            pass
        else:
            raise AssertionError("the kernel accepts for nobody")
        peer.close()
        with gevent.socket.socket() as sock:
            sock.setsockopt(gevent.socket.SOL_SOCKET, gevent.socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1)
        server.start()
        server.shutdown()
        os.write(write, b"x")
        wait(pid)
    """
    assert run(program, patched) == []


def test_the_servers_of_other_threads_are_left_alone_too() -> None:
    program = """
        start = monkey_free = gevent.monkey.get_original("_thread", "start_new_thread")
        ready = gevent.monkey.get_original("_thread", "allocate_lock")()
        ready.acquire()
        servers = []

        def serve():
            server = PsServer(Who(), host=HOST, port=0, framing=Line())
            server.start()
            servers.append(server)
            ready.release()
            server.wait_for()
            ended.append(1)

        ended = []
        start(serve, ())
        ready.acquire()
        server = servers[0]
        peers = [Peer(server.address) for _ in range(5)]
        assert {peer.who() for peer in peers} == {"parent"}
        theirs = {peer.socket.fileno() for peer in peers}
        before = set(sockets()) if sys.platform == "linux" else ()

        def child():
            assert not server.started and server.get_session_count() == 0
            if sys.platform == "linux":
                assert set(sockets()) <= theirs, sockets()
            server.shutdown()
            gevent.sleep(0.3)
            with PsServer(Who(), host="localhost", port=0) as own:
                Peer((HOST, own.address[1])).close()

        def in_thread():
            "One without a hub."
            results.append(fork(child))

        results = []
        pids = [fork(child)]
        start(in_thread, ())
        eventually(lambda: results)
        wait(*pids, *results)
        assert {peer.ask() for peer in peers} == {"parent"}
        server.shutdown()
        eventually(lambda: ended)
    """
    assert run("import gevent.monkey" + textwrap.dedent(program)) == []


def test_what_another_thread_held_at_a_fork_holds_up_no_child() -> None:
    program = """
        class Keeps(Who):
            def on_open(self, session):
                super().on_open(session)
                sessions.append(session)

        def child():
            signal.alarm(5)
            session = sessions[0]
            assert not session.post("x")
            for ask in (session.send_eof, session.close, session.abort):
                ask()
            with contextlib.suppress(PsSendError):
                session.send("x")

        def in_thread():
            "One without a hub, while another one is about to post."
            pids.append(fork(child))

        sessions, pids = [], []
        with PsServer(Keeps(), host=HOST, port=0, framing=Line()) as server:
            peer = Peer(server.address)
            assert peer.who() == "parent"
            with sessions[0]._manager.thread.lock:
                monkey.get_original("_thread", "start_new_thread")(in_thread, ())
                while not pids:
                    monkey.get_original("time", "sleep")(0.01)
            wait(*pids)
            assert peer.ask() == "parent"
    """
    assert run(program) == []


@PATCHED
def test_a_signal_ends_a_child_of_a_program_in_serve_forever(patched: str) -> None:
    program = """
        from gevent import spawn

        class Quiet(Who):
            pass

        def forks():
            process = multiprocessing.get_context("fork").Process(target=gevent.sleep, args=(60,))
            process.start()
            gevent.sleep(0.3)
            process.terminate()
            with gevent.Timeout(10):
                while process.is_alive():
                    gevent.sleep(0.02)
            print(process.exitcode)
            peer = Peer(server.address)
            assert peer.who() == "parent"
            peer.close()
            server.shutdown()

        server = PsServer(Quiet(), host=HOST, port=0, framing=Line())
        spawn(forks)
        server.serve_forever()
    """
    program = program.replace("spawn(forks)", "gevent.spawn_later(0.1, forks)")
    assert run(program, patched) == ["-15"]


@PATCHED
def test_a_worker_that_a_thread_has_forked_ends_gracefully_at_a_signal(patched: str) -> None:
    """That thread is the main one of the child, to Python: it handles the signals there."""
    program = """
        class Closes(Who):
            def on_close(self, session, reason):
                say(reason.name)

        def serve():
            PsServer(Closes(), listener=sock, framing=Line()).serve_forever()

        def in_thread():
            workers.append(fork(serve, monkey.get_original("os", "fork")))

        sock = listening()
        workers = []
        monkey.get_original("_thread", "start_new_thread")(in_thread, ())
        eventually(lambda: workers)
        peer = Peer(sock.getsockname())
        assert peer.who() == str(workers[0])
        os.kill(workers[0], signal.SIGTERM)
        wait(*workers)
    """
    assert run(program, patched) == ["SHUTDOWN"]


def test_a_child_whose_hub_has_nothing_to_do_ends() -> None:
    """A greenlet that forks, and returns in the child: the main greenlet waits for nobody."""
    program = """
        def forks():
            if os.fork() == 0:
                return
            os.wait()
            peer = Peer(server.address)
            assert peer.who() == "parent"
            peer.close()
            server.shutdown()

        with PsServer(Who(), host=HOST, port=0, framing=Line()) as server:
            gevent.spawn(forks)
            try:
                server.wait_for()
            except gevent.exceptions.LoopExit:
                assert os.getpid() != PARENT
                os._exit(0)
            assert os.getpid() == PARENT
        print("end")
    """
    assert run("import gevent.exceptions" + textwrap.dedent(program)) == ["end"]


def test_a_start_that_forks_in_on_start_is_not_the_childs() -> None:
    program = """
        class Forks(Who):
            def on_start(self, owner):
                global pid
                pid = os.fork()

        server = PsServer(Forks(), host=HOST, port=0, framing=Line())
        try:
            server.start()
        except PsServerError as exc:
            assert pid == 0
            print("child:", "not here" in str(exc), flush=True)
            os._exit(0)
        wait(pid)
        assert Peer(server.address).who() == "parent"
        server.shutdown()
    """
    assert run(program) == ["child: True"]


@PATCHED
def test_what_is_left_of_a_post_to_many_is_sent_by_the_parent_alone(patched: str) -> None:
    run(
        """
        from psofa_gevent import group

        group.TURN = 0.0
        with PsServer(PsCallback(), host=HOST, port=0, framing=Line()) as server:
            peers = [ScriptedClient(server.address) for _ in range(60)]
            eventually(lambda: len([s for s in server.sessions if s.waiting_since]) == 60)
            server.broadcast("news")
            wait(fork(lambda: gevent.sleep(0.1)))
            server.broadcast("end")
            for peer in peers:
                peer.expect("news\\nend\\n")
                peer.close()
        """,
        patched,
    )
