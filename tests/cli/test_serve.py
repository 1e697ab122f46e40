"""``psofa serve``: what it serves, how it ends, and what SIGHUP does."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import ssl
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.subprocess
import pytest
from gevent import monkey

import helpers
from command_line import APP, SECONDS, assert_echoes, command, program, program_of, write_module
from psofa_gevent import PsClient
from psofa_gevent.cli import serve
from psofa_gevent.testing import RecordingCallback, ScriptedClient, eventually

pytestmark = pytest.mark.programs


# What it serves


def test_serve_echoes_on_the_loopback_address_that_it_prints_first(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        host, port = started.read_address()
        assert host == "127.0.0.1"
        assert_echoes((host, port))
        assert started.stop() == 0


@pytest.mark.skipif(shutil.which("nc") is None, reason="no nc here")
def test_nc_talks_to_serve(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        host, port = started.read_address()
        pipe = gevent.subprocess.PIPE
        with gevent.subprocess.Popen(
            ["nc", host, str(port)], stdin=pipe, stdout=pipe, text=True
        ) as nc:
            assert nc.stdin is not None
            assert nc.stdout is not None
            nc.stdin.write("hello\n")
            nc.stdin.flush()
            with gevent.Timeout(SECONDS, AssertionError("no answer")):
                assert nc.stdout.readline() == "hello\n"
            assert started.stop() == 0
            nc.kill()


def test_resets_cost_serve_nothing(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        address = started.read_address()
        for _ in range(100):
            client = ScriptedClient(address)
            client.send("hello")
            client.expect("hello")
            client.reset()
        assert_echoes(address)
        assert started.stop() == 0
        assert "Traceback" not in "".join(started.log)


@pytest.mark.parametrize("attribute", ["Upper", "make", "Holder.callback"])
def test_serve_takes_a_class_a_factory_and_an_instance(tmp_path: Path, attribute: str) -> None:
    write_module(tmp_path, "app", APP)
    with program(tmp_path, "serve", f"app:{attribute}", "--port", "0") as started:
        assert_echoes(started.read_address(), "hello", "HELLO")
        assert started.stop() == 0


def test_serve_listens_in_several_places(tmp_path: Path) -> None:
    with gevent.socket.create_server(("127.0.0.1", 0)) as inherited:
        number = inherited.fileno()
        places = ["127.0.0.1:0", f"unix:{tmp_path}/echo.sock", f"fd:{number}"]
        arguments = [word for place in places for word in ("--listener", place)]
        with program(tmp_path, "serve", *arguments, pass_fds=[number]) as started:
            assert_echoes(started.read_address())
            assert started.read_line() == f"  and on      unix:{tmp_path}/echo.sock"
            assert started.read_line() == f"              127.0.0.1:{inherited.getsockname()[1]}"
            assert started.read_line() == "  serving     an echo"
            assert_echoes(inherited.getsockname())
            assert started.stop() == 0
    assert os.listdir(tmp_path) == []


def test_serve_takes_a_module_in_a_package(tmp_path: Path) -> None:
    write_module(tmp_path, "company/__init__", "")
    write_module(tmp_path, "company/app", APP)
    with program(tmp_path, "serve", "company.app:Upper", "--port", "0") as started:
        assert_echoes(started.read_address(), "hello", "HELLO")


def test_the_script_looks_in_the_current_directory_too(tmp_path: Path) -> None:
    write_module(tmp_path, "app", APP)
    script = (
        "import sys; from psofa_gevent.__main__ import main; sys.argv[0] = '/bin/psofa'; "
        "sys.exit(main())"
    )
    # -P: as for an installed script, the current directory is not where Python looks.
    as_script = [sys.executable, "-P", "-c", script, "serve", "app:Upper", "--port", "0"]
    with program_of(as_script, tmp_path) as started:
        assert_echoes(started.read_address(), "hello", "HELLO")
        assert started.stop() == 0


def test_a_served_callback_may_use_blocking_libraries(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import time
        from psofa_gevent import PsCallback

        class Sleeper(PsCallback):
            def on_message(self, session, message):
                if message == b"sleep":
                    time.sleep(1000)
                session.send(message)
        """,
    )
    with program(
        tmp_path, "serve", "app:Sleeper", "--port", "0", "--shutdown-timeout", "0.1"
    ) as started:
        address = started.read_address()
        with ScriptedClient(address) as sleeper:
            sleeper.send("sleep")
            assert_echoes(address)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_shuts_serve_down_and_exits_0(tmp_path: Path, number: signal.Signals) -> None:
    with program(tmp_path, "serve", "--port", "0") as started:
        with ScriptedClient(started.read_address()) as client:
            client.send("hello")
            client.expect("hello")
            assert started.stop(number) == 0
            client.expect_eof()
        assert "Traceback" not in "".join(started.log)


HANGS = """
    import gevent
    from psofa_gevent import PsCallback

    class Hangs(PsCallback):
        def on_message(self, session, message):
            session.send("begun")
            gevent.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_serve_at_once(tmp_path: Path, number: signal.Signals) -> None:
    write_module(tmp_path, "app", HANGS)
    arguments = ["serve", "app:Hangs", "--port", "0", "--shutdown-timeout", "none"]
    with program(tmp_path, *arguments) as started:
        address = started.read_address()
        client = ScriptedClient(address)
        client.send("begin")
        client.expect("begun")
        started.process.send_signal(number)
        eventually(lambda: not helpers.accepts_connections(address))
        assert started.stop(number) == -number
        client.close()


def test_shutdown_timeout_bounds_what_a_callback_may_take(tmp_path: Path) -> None:
    write_module(tmp_path, "app", HANGS)
    with (
        program(
            tmp_path, "serve", "app:Hangs", "--port", "0", "--shutdown-timeout", "0.1"
        ) as started,
        ScriptedClient(started.read_address()) as client,
    ):
        client.send("begin")
        client.expect("begun")
        assert started.stop() == 0


def test_drain_lets_sessions_end_by_themselves(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0", "--drain", "1000") as started:
        address = started.read_address()
        with ScriptedClient(address) as client:
            client.send("before")
            client.expect("before")
            started.process.send_signal(signal.SIGTERM)
            started.read_log("shutting down")
            eventually(lambda: not helpers.accepts_connections(address))
            client.send("after")
            client.expect("after")
        assert started.wait() == 0


def test_a_callback_may_shut_serve_down_with_times_of_its_own(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        from psofa_gevent import PsCallback

        class Once(PsCallback):
            def on_message(self, session, message):
                session.owner.shutdown(5.0, drain=0.0)
        """,
    )
    with program(tmp_path, "serve", "app:Once", "--port", "0", "--drain", "1000") as started:
        with ScriptedClient(started.read_address()) as client:
            client.send("stop")
            client.expect_eof()
        assert started.wait() == 0


def test_serve_raises_the_descriptor_limit_to_the_hard_one(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import resource
        from psofa_gevent import PsCallback

        class Limit(PsCallback):
            def on_message(self, session, message):
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                session.send("raised" if soft == hard else f"{soft} of {hard}")
        """,
    )
    limited = ["sh", "-c", 'ulimit -Sn 200 && exec "$@"', "sh"]
    with program_of([*limited, *command("serve", "app:Limit", "--port", "0")], tmp_path) as started:
        assert_echoes(started.read_address(), "limit?", "raised")
        assert started.stop() == 0
        assert "raised from 200 to" in "".join(started.log)


# SIGHUP


@pytest.fixture
def certificate_files(tmp_path: Path) -> Callable[[str], ssl.SSLContext]:
    """Writes cert.pem and key.pem for a name, and returns a client's context that trusts them."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()

    def write(name: str) -> ssl.SSLContext:
        certificate = authority.issue_cert("127.0.0.1", common_name=name)
        certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
        certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
        context = ssl.create_default_context()
        authority.configure_trust(context)
        return context

    return write


def name_in_certificate(address: tuple[str, int], context: ssl.SSLContext) -> object:
    # In the thread of a pool: Python's own sockets block.
    def ask() -> object:
        native: Any = monkey.get_original("socket", "socket")()
        with native, context.wrap_socket(native, server_hostname="127.0.0.1") as sock:
            sock.connect(address)
            certificate: Any = sock.getpeercert()
            return dict(pair for (pair,) in certificate["subject"])["commonName"]

    return gevent.get_hub().threadpool.apply(ask)


TLS_FILES = ("--certificate", "cert.pem", "--key", "key.pem")


def test_sighup_reads_the_certificate_again_and_the_sessions_go_on(
    tmp_path: Path, certificate_files: Callable[[str], ssl.SSLContext]
) -> None:
    context = certificate_files("first")
    with program(tmp_path, "serve", "--port", "0", *TLS_FILES) as started:
        address = started.read_address()
        assert name_in_certificate(address, context) == "first"
        with PsClient(RecordingCallback(), *address, ssl_context=context) as client:
            certificate_files("second")
            started.process.send_signal(signal.SIGHUP)
            started.read_log("SIGHUP: read cert.pem again")
            assert name_in_certificate(address, context) == "second"
            assert client.session is not None
            client.session.send("still here")
            eventually(lambda: client.session is not None and client.session.bytes_received)
        assert started.stop() == 0


@pytest.mark.parametrize("wrong", ["cert.pem", "key.pem"])
@pytest.mark.parametrize("how", ["garbage", "missing"])
def test_sighup_with_files_that_can_not_be_used_keeps_the_certificate(
    wrong: str,
    how: str,
    tmp_path: Path,
    certificate_files: Callable[[str], ssl.SSLContext],
) -> None:
    context = certificate_files("first")
    with program(tmp_path, "serve", "--port", "0", *TLS_FILES) as started:
        address = started.read_address()
        if how == "missing":
            (tmp_path / wrong).unlink()
        else:
            (tmp_path / wrong).write_text("no certificate")
        started.process.send_signal(signal.SIGHUP)
        started.read_log("SIGHUP: the certificate stays as it was: cannot serve TLS with cert.pem")
        assert "ERROR" in started.log[-1]
        assert name_in_certificate(address, context) == "first"
        certificate_files("second")
        started.process.send_signal(signal.SIGHUP)
        started.read_log("SIGHUP: read cert.pem again")
        assert name_in_certificate(address, context) == "second"
        assert started.stop() == 0


@pytest.mark.parametrize("is_ignored", [False, True], ids=["by default", "under nohup"])
def test_sighup_with_nothing_to_reload_is_told_and_ignored(
    is_ignored: bool, tmp_path: Path
) -> None:
    whole_command = command("serve", "--port", "0")
    if is_ignored:
        whole_command = ["sh", "-c", """trap '' HUP; exec "$@" """, "sh", *whole_command]
    with program_of(whole_command, tmp_path) as started:
        address = started.read_address()
        with ScriptedClient(address) as client:
            started.process.send_signal(signal.SIGHUP)
            started.read_log("SIGHUP: ignored")
            client.send("still here")
            client.expect("still here")
            assert started.stop() == 0


def test_sighup_is_left_to_the_application_where_that_has_a_handler(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import signal
        from psofa_gevent import PsCallback

        class Callback(PsCallback):
            pass

        signal.signal(signal.SIGHUP, lambda number, frame: print("the application's", flush=True))
        """,
    )
    with program(tmp_path, "serve", "app:Callback", "--port", "0") as started:
        started.read_address()
        for _ in range(3):
            started.read_line()
        started.process.send_signal(signal.SIGHUP)
        assert started.read_line() == "the application's"
        assert started.stop() == 0
        assert "SIGHUP" not in "".join(started.log)


# The limit of open files


class PretendedLimit:
    """RLIMIT_NOFILE of a system that refuses some values."""

    def __init__(self, soft: int, hard: int, refused: set[int]) -> None:
        self.soft, self.hard, self.refused = soft, hard, refused

    def getrlimit(self, _kind: int) -> tuple[int, int]:
        return self.soft, self.hard

    def setrlimit(self, _kind: int, limits: tuple[int, int]) -> None:
        assert limits[1] == self.hard
        if limits[0] in self.refused:
            raise ValueError("current limit exceeds maximum limit")
        self.soft = limits[0]


UNLIMITED = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "refused", "raised_to"),
    [
        (256, 4096, set(), 4096),
        (4096, 4096, {4096}, 4096),
        (256, UNLIMITED, set(), UNLIMITED),
        (256, UNLIMITED, {UNLIMITED}, serve.OPEN_MAX),  # macOS
        (256, UNLIMITED, {UNLIMITED, serve.OPEN_MAX}, 256),
        (20_000, UNLIMITED, {UNLIMITED}, 20_000),
        (UNLIMITED, UNLIMITED, {UNLIMITED}, UNLIMITED),
    ],
)
def test_the_descriptor_limit_is_raised_as_far_as_the_system_allows(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, refused: set[int], raised_to: int
) -> None:
    limit = PretendedLimit(soft, hard, refused)
    monkeypatch.setattr(resource, "getrlimit", limit.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", limit.setrlimit)
    serve.raise_descriptor_limit()
    assert limit.soft == raised_to
