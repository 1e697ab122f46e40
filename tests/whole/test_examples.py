"""Every example runs as its first lines say, and ends well.

The proxy: test_example_proxy.py, and the one behind HAProxy: test_balancers.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.subprocess
import pytest

from example_process import (
    EXAMPLES,
    Address,
    announced_address,
    end,
    ended_well,
    example,
    host_and_port,
    serving_example,
)
from gunicorn_process import get, http, reload_gunicorn, under_load
from helpers import (
    LOOPBACK,
    PythonProcess,
    ScriptedServer,
    free_port,
    python_process,
    stalled_peer,
)
from marks import needs_ipv6
from psofa_gevent import PsCallback, PsServer
from psofa_gevent.framing import Line
from psofa_gevent.testing import ScriptedClient, eventually

pytestmark = pytest.mark.programs

ASK_TIMEOUT = "1.0"  # seconds: more than the steps between question and answer take in the tests


def test_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"\(([\w.]+\.py)\)", text))
    assert listed == {path.name for path in EXAMPLES.glob("*.py")}
    for folder in {path.parent.name for path in EXAMPLES.glob("*/*.py")}:
        assert f"({folder}/README.md)" in text


# Counter


@pytest.mark.parametrize(
    ("server", "client", "number"),
    [
        ("counter_server.py", "counter_client.py", signal.SIGTERM),
        ("counter_server_async.py", "counter_client_async.py", signal.SIGINT),
    ],
    ids=["sync", "async"],
)
def test_counter_server_and_client_count_past_three(
    server: str, client: str, number: signal.Signals
) -> None:
    with serving_example(server, "--port", "0", number=number) as (process, address):
        with example(client, "--port", str(address[1])) as client_process:
            ended_well(client_process)
        process.expect_line("on_close")
    for lines in (process.lines, client_process.lines):
        text = "\n".join(lines)
        assert "on_open" in text
        assert "inc: 0" in text
        assert len(re.findall("^on_close", text, re.MULTILINE)) == 1
    # One of the two counts to four and closes, or both do.
    assert "SELF_CLOSE, inc: 4" in "\n".join(process.lines + client_process.lines)


@pytest.mark.parametrize("client", ["counter_client.py", "counter_client_async.py"])
def test_counter_client_says_why_it_can_not_connect(client: str) -> None:
    with gevent.socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with example(client, "--port", str(port)) as process:
            assert process.wait() == 1
    assert "Traceback" not in "\n".join(process.lines)
    assert str(port) in process.lines[-1]


SERVERS_TO_PORT = [
    ["counter_server.py", "--port"],
    ["counter_server_async.py", "--port"],
    ["multi_client.py", "--port"],
    ["chat.py", "--port"],
    ["json_lines.py", "--port"],
    ["guessing_game.py", "--port"],
    ["file_server.py", ".", "--port"],
    ["systemd/echo.py", "--port"],
    ["behind_haproxy.py", "--port"],
    ["wsgi_flask.py", "--http-port", "0", "--device-port"],
    ["wsgi_flask.py", "--device-port", "0", "--http-port"],
]
OTHERS_TO_PORT = [
    ["counter_client.py", "--port"],
    ["counter_client_async.py", "--port"],
    ["ipv6.py", "--port"],
]


@pytest.mark.parametrize("command", SERVERS_TO_PORT + OTHERS_TO_PORT, ids=" ".join)
def test_port_that_there_is_not_is_told_in_one_line(command: list[str]) -> None:
    with example(*command, "99999") as process:
        assert process.wait() == 1
    assert re.fullmatch(r".*port must be (from \d to |0-)65535.*", "\n".join(process.lines))


@pytest.mark.parametrize("command", SERVERS_TO_PORT, ids=" ".join)
def test_port_in_use_is_told_in_one_line(command: list[str]) -> None:
    with socket.socket() as taken:  # and nobody listens, for whose end a server would wait
        taken.bind((LOOPBACK, 0))
        with example(*command, str(taken.getsockname()[1])) as process:
            assert process.wait() == 1
    assert re.fullmatch(r".*Address (already )?in use.*", "\n".join(process.lines))


# IPv6, multi client


@needs_ipv6
def test_ipv6_server_is_reached_over_both_protocols() -> None:
    with example("ipv6.py", "--port", "0") as process:
        ended_well(process)
    assert process.lines[-3:] == [
        "IPV6 client to ::1: you are ::1",
        "IPV4 client to 127.0.0.1: you are ::ffff:127.0.0.1",
        "IPV6 client to 127.0.0.1: you are ::ffff:127.0.0.1",
    ]


def test_multi_client_talks_to_three_servers() -> None:
    with example("multi_client.py", "--port", "0") as process:
        ended_well(process)
    text = "\n".join(process.lines)
    ports = re.findall(r"listening on 127\.0\.0\.1:(\d+)", text)
    assert len(set(ports)) == 3
    for port in ports:
        assert re.findall(rf"port {port} answered (\d)", text) == ["1", "2", "3"]
    assert text.count("closed: SELF_CLOSE") == 3


# Chat


def join(address: Address, name: str, others: str) -> ScriptedClient:
    member = ScriptedClient(address)
    member.expect("What is your name?\n")
    member.send(f"{name}\n")
    member.expect(f"* welcome, {name}. Here: {others}\n")
    return member


def test_json_lines_are_summed_and_uploads_counted() -> None:
    with (
        serving_example("json_lines.py", "--port", "0") as (_, address),
        ScriptedClient(address) as client,
    ):
        client.send('{"name": "pi", "value": 3}\n{"name": "pi", "val')
        client.expect('{"name": "pi", "value": 3.0}\n')
        client.send('ue": 0.5}\nUPLOAD 5\n12\n45{"name": "e", "value": 2}\n')
        client.expect(
            '{"name": "pi", "value": 3.5}\n{"name": "uploaded", "value": 5}\n'
            '{"name": "e", "value": 2.0}\n'
        )


def test_json_lines_ends_who_sends_something_else() -> None:
    with (
        serving_example("json_lines.py", "--port", "0") as (process, address),
        ScriptedClient(address) as client,
    ):
        client.send("hello\n")
        client.expect_eof()
        process.expect_line("JSONDecodeError")


def test_msgpack_replies_find_their_requests() -> None:
    pytest.importorskip("msgpack")
    with example("msgpack_requests.py") as process:
        ended_well(process)
    squares = ["10 squared is 100", "20 squared is 400", "30 squared is 900"]
    assert process.lines[1:4] == squares
    assert "no reply came within 2 s" in process.lines[4]


def test_guessing_game_is_played_to_its_end() -> None:
    with (
        serving_example("guessing_game.py", "--port", "0", "--number", "42") as (_, address),
        ScriptedClient(address) as player,
        ScriptedClient(address) as other,
    ):
        player.expect("What is your name?\n")
        player.send("ann\n")
        player.expect("Hello, ann. Guess a number from 1 to 100.\n60 seconds left\n")
        player.send("50\n30\nx\n42\n")
        player.expect("smaller\nlarger\nA number, please.\nYes, ann! 4 guesses.\n")
        player.expect_eof()
        other.expect("What is your name?\n")


def test_guessing_game_ends_when_its_time_is_over() -> None:
    arguments = ("--port", "0", "--seconds", "1")
    with (
        serving_example("guessing_game.py", *arguments) as (_, address),
        ScriptedClient(address) as silent,
        ScriptedClient(address) as slow,
    ):
        slow.send("bob\n")
        silent.expect("What is your name?\nNo name? Bye!\n")
        silent.expect_eof()
        assert slow.receive_until_eof().endswith(b"Your time is over.\n")


def test_file_server_sends_files_whole_and_nothing_outside_of_its_directory(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    content = bytes(range(256)) * 40_000
    (folder / "sub" / "large").write_bytes(content)
    (folder / "empty").touch()
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    os.mkfifo(folder / "fifo")
    with (
        serving_example("file_server.py", str(folder), "--port", "0") as (_, address),
        ScriptedClient(address) as client,
    ):
        client.send("sub/large\nempty\nsub/../sub/large\n")
        client.expect(b"%d\n%b0\n" % (len(content), content))
        client.expect(b"%d\n%b" % (len(content), content))
        outside = ["../secret", str(tmp_path / "secret"), "link", "sub/../../secret"]
        for name in [*outside, "", ".", "sub", "nope", "fifo", "a\0b", "\udcff", "x" * 4_000]:
            client.send(os.fsencode(name) + b"\n")
            client.expect("- no such file\n")


@pytest.mark.parametrize("command", [["nc", "-N"], ["socat", "-t", "10", "-"]], ids=["nc", "socat"])
def test_file_server_is_used_with_programs_that_everyone_has(
    command: list[str], tmp_path: Path
) -> None:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    content = os.urandom(5_000_000)
    (tmp_path / "file").write_bytes(content)
    with serving_example("file_server.py", str(tmp_path), "--port", "0") as (_, (host, port)):
        to = [f"TCP:{host}:{port}"] if command[0] == "socat" else [host, str(port)]
        done = gevent.subprocess.run(
            [*command, *to], input=b"file\n", capture_output=True, timeout=20, check=True
        )
    assert done.stdout == b"5000000\n" + content


def test_tls_echo_is_trusted_by_who_has_its_certificate(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    paths = {name: str(tmp_path / name) for name in ("cert.pem", "key.pem", "ca.pem", "other.pem")}
    authority = trustme.CA()
    authority.cert_pem.write_to_path(paths["ca.pem"])
    trustme.CA().cert_pem.write_to_path(paths["other.pem"])
    certificate = authority.issue_cert("localhost")
    certificate.cert_chain_pems[0].write_to_path(paths["cert.pem"])
    certificate.private_key_pem.write_to_path(paths["key.pem"])
    files = (paths["cert.pem"], paths["key.pem"])
    with serving_example("tls_echo.py", "serve", *files, "--port", "0") as (server, address):
        port = ("--port", str(address[1]))
        server.send_signal(signal.SIGHUP)
        with example("tls_echo.py", "ask", paths["ca.pem"], *port) as process:
            ended_well(process)
        assert process.lines == ["hello TLSv1.3"]
        with example("tls_echo.py", "ask", paths["other.pem"], *port) as process:
            assert process.wait() == 1
        assert "certificate verify failed" in process.lines[-1]


def test_tls_echo_has_certificates_by_name_and_knows_its_clients(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    authority, stranger = trustme.CA(), trustme.CA()
    ca = str(tmp_path / "ca.pem")
    authority.cert_pem.write_to_path(ca)

    def issue(signer: Any, name: str, **names: str) -> list[str]:
        files = [str(tmp_path / f"{name}.pem"), str(tmp_path / f"{name}.key")]
        issued = signer.issue_cert(name, **names)
        issued.cert_chain_pems[0].write_to_path(files[0])
        issued.private_key_pem.write_to_path(files[1])
        return files

    first, second = issue(authority, "localhost"), issue(authority, "b.example")
    device = issue(authority, "device.example", common_name="device 7")
    forged = issue(stranger, "forged.example", common_name="device 7")
    options = ("--name", "b.example", *second, "--clients", ca, "--port", "0")
    with serving_example("tls_echo.py", "serve", *first, *options) as (server, address):
        ask = ("tls_echo.py", "ask", ca, "--port", str(address[1]))
        Path(first[0]).write_text("half of one")
        server.send_signal(signal.SIGHUP)
        server.expect_line("not reloaded: ")
        for name in ("localhost", "b.example"):
            with example(*ask, "--server", name, "--identity", *device) as process:
                ended_well(process)
            assert process.lines == ["welcome, device 7 TLSv1.3", "hello TLSv1.3"]
        with example(*ask, "--server", "device.example", "--identity", *device) as process:
            assert process.wait() == 1
        for identity in ([], ["--identity", *forged]):
            with example(*ask, *identity) as process:
                assert process.wait() == 1
            assert "alert" in process.lines[-1]


def test_chat_members_hear_each_other() -> None:
    with (
        serving_example("chat.py", "--port", "0") as (_, address),
        join(address, "ann", "nobody else") as ann,
        join(address, "bob", "ann") as bob,
    ):
        ann.expect("* bob joined\n")
        with join(address, "cy", "ann, bob"):
            for member in (ann, bob):
                member.expect("* cy joined\n")
            ann.send("hello\n")
            bob.expect("ann: hello\n")
        for member in (ann, bob):
            member.expect("* cy left\n")
        bob.send("half a ")
        ann.expect_nothing()
        bob.send("line\r\nand another\nthen")
        ann.expect("bob: half a line\nbob: and another\n")


def test_chat_refuses_a_name_that_is_taken_or_empty() -> None:
    with (
        serving_example("chat.py", "--port", "0") as (_, address),
        join(address, "ann", "nobody else"),
        ScriptedClient(address) as other,
    ):
        other.expect("What is your name?\n")
        other.send("\nann\nbob\n")
        other.expect("* a name has 1 to 20 letters. What is your name?\n")
        other.expect("* ann is here already. What is your name?\n")
        other.expect("* welcome, bob. Here: ann\n")


def test_chat_ends_a_member_whose_line_never_ends() -> None:
    with (
        serving_example("chat.py", "--port", "0") as (_, address),
        join(address, "ann", "nobody else") as ann,
    ):
        ann.send(b"x" * 2_000)
        ann.expect_eof()


def test_chat_drops_a_slow_member_and_the_others_do_not_wait() -> None:
    line = b"x" * 900 + b"\n"
    batch = 100
    with (
        serving_example("chat.py", "--port", "0") as (_, address),
        join(address, "ann", "nobody else") as ann,
        join(address, "bob", "ann") as bob,
        stalled_peer(address) as slow,
    ):
        ann.expect("* bob joined\n")
        slow.send("slow\n")
        for member in (ann, bob):
            member.expect("* slow joined\n")
        # What is kept for it and the kernel's buffers take some megabytes before it is dropped.
        for _batch in range(300):
            ann.send(line * batch)
            heard = bob.receive(batch * len(b"ann: " + line))
            if b"* slow left\n" in heard:
                break
        assert b"* slow left\n" in heard
        ann.expect("* slow left\n")


# Devices behind Flask


def ask(address: Address, name: str, question: str) -> gevent.Greenlet[..., tuple[int, bytes]]:
    """Ask a device in a greenlet of its own, whose value is the answer's status and body."""
    path = f"/devices/{name}/ask"
    return gevent.spawn(http, address, "POST", path, question.encode())


def list_devices(http_address: Address) -> list[str]:
    status, answer = http(http_address, "GET", "/devices")
    assert status == 200
    names: list[str] = json.loads(answer)
    return names


def connect_device(devices: Address, http_address: Address, name: str) -> ScriptedClient:
    device = ScriptedClient(devices)
    device.send(f"HELLO {name}\n")
    eventually(lambda: name in list_devices(http_address), timeout=20)
    return device


@contextlib.contextmanager
def flask_under_pywsgi() -> Iterator[tuple[PythonProcess, Address, Address]]:
    pytest.importorskip("flask")
    ports = ("--http-port", "0", "--device-port", "0")
    with example("wsgi_flask.py", *ports, "--ask-timeout", ASK_TIMEOUT) as process:
        devices = announced_address(process, "devices on ")
        yield process, devices, announced_address(process, "http on ")
        end(process)


@contextlib.contextmanager
def flask_under_gunicorn() -> Iterator[tuple[PythonProcess, Address, Address]]:
    pytest.importorskip("flask")
    pytest.importorskip("gunicorn")
    ports = ("-b", "127.0.0.1:0", "-b", "127.0.0.1:0")
    command = ("-m", "gunicorn", "-c", str(EXAMPLES / "gunicorn.conf.py"), *ports)
    with python_process(*command, environment={"ASK_TIMEOUT": ASK_TIMEOUT}) as process:
        http_address = announced_address(process, "Listening at: ")
        yield process, announced_address(process, "devices on "), http_address
        end(process)


WsgiStack = Callable[[], contextlib.AbstractContextManager[tuple[PythonProcess, Address, Address]]]


@pytest.mark.parametrize("wsgi_stack", [flask_under_pywsgi, flask_under_gunicorn])
def test_http_requests_talk_to_devices(wsgi_stack: WsgiStack) -> None:
    with wsgi_stack() as (_, devices, http_address):
        assert list_devices(http_address) == []
        assert http(http_address, "POST", "/devices/lamp/ask", b"on?")[0] == 404
        with (
            connect_device(devices, http_address, "lamp") as lamp,
            connect_device(devices, http_address, "door") as door,
        ):
            assert list_devices(http_address) == ["door", "lamp"]
            assert http(http_address, "POST", "/devices/lamp/ask", b"two\nlines")[0] == 400

            # A device answers in order; another device is asked meanwhile.
            first = ask(http_address, "lamp", "on?")
            lamp.expect("on?\n")
            second = ask(http_address, "lamp", "how bright?")
            lamp.expect("how bright?\n")
            other = ask(http_address, "door", "open?")
            door.expect("open?\n")
            door.send("no\r\n")
            assert other.get(timeout=5) == (200, b"no")
            lamp.send("ye")
            lamp.send("s\n")
            assert first.get(timeout=5) == (200, b"yes")
            lamp.send("very\n")
            assert second.get(timeout=5) == (200, b"very")

            # A device that does not answer, and one that leaves.
            assert ask(http_address, "lamp", "there?").get(timeout=5)[0] == 504
            lamp.expect("there?\n")
            lamp.expect_eof()
            asked = ask(http_address, "door", "there?")
            door.expect("there?\n")
            door.close()
            assert asked.get(timeout=5)[0] == 502
        eventually(lambda: list_devices(http_address) == [])


@pytest.mark.parametrize("wsgi_stack", [flask_under_pywsgi, flask_under_gunicorn])
def test_wsgi_stack_closes_its_devices_when_it_ends(wsgi_stack: WsgiStack) -> None:
    with (
        wsgi_stack() as (process, devices, http_address),
        connect_device(devices, http_address, "lamp") as old,
        connect_device(devices, http_address, "lamp") as lamp,
    ):
        old.expect_eof()  # the same device has come back
        process.send_signal(signal.SIGTERM)
        lamp.expect_eof()


def test_gunicorn_reload_refuses_neither_a_request_nor_a_device() -> None:
    with flask_under_gunicorn() as (process, devices, http_address):

        def ask_for_the_list() -> None:
            assert get(http_address, "/devices")[0] == 200

        def connect_one() -> None:
            with ScriptedClient(devices) as device:
                device.send("HELLO passer-by\n")

        with (
            connect_device(devices, http_address, "lamp") as lamp,
            under_load(ask_for_the_list, connect_one),
        ):
            reload_gunicorn(process)
            lamp.expect_eof()
            connect_device(devices, http_address, "lamp").close()


# A client that stays connected


def test_steady_client_survives_restarts_and_falls_back_on_the_second_server() -> None:
    port = free_port()
    with (
        ScriptedServer() as second,
        example("steady_client.py", "--port", str(port), host_and_port(second.address)) as process,
    ):
        process.expect_line("connecting")
        peer = second.accept(timeout=20)
        peer.expect("hello\n")
        peer.send("good day\n")
        process.expect_line("received good day")
        for _ in range(2):
            with PsServer(PsCallback(), host="127.0.0.1", port=port, framing=Line()) as server:
                peer.close()
                process.expect_line(f"connected to 127.0.0.1:{port}")
                assert eventually(lambda: server.sessions)
            process.expect_line("lost PEER_CLOSE")
            peer = second.accept(timeout=20)
        end(process)
        assert any("closed SELF_CLOSE" in line for line in process.lines)
