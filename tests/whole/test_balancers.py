"""Servers behind real load balancers: HAProxy, and nginx's stream module, in the foreground.

Each runs as a child, from a directory of the test and without being root's. The last of its
listeners, which hands nothing on, tells when it is ready.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import gevent.ssl
import gevent.subprocess
import pytest

from example_process import EXAMPLES, serving_example
from helpers import LOOPBACK, accepts_connections
from marks import needs_ipv6
from proxy_headers import CLIENT, SERVER, tlv, v1, v2, with_crc
from psofa_gevent import PsCallback, PsRefusal, PsServer, PsSession
from psofa_gevent.testing import RecordingCallback, ScriptedClient, ServerFactory, eventually

pytestmark = pytest.mark.programs

EXAMPLE = EXAMPLES / "haproxy.cfg"
MIB = 1_048_576


@contextlib.contextmanager
def running(command: Sequence[str], ready_at: int, log: Path) -> Iterator[None]:
    """A program, from the moment in which it listens on the port `ready_at`."""
    with log.open("w") as output:
        process = gevent.subprocess.Popen(
            command, stdin=gevent.subprocess.DEVNULL, stdout=output, stderr=output, cwd=log.parent
        )
    try:
        eventually(
            lambda: process.returncode is not None or accepts_connections((LOOPBACK, ready_at)), 20
        )
        assert process.returncode is None, "it has ended"
        yield
        assert process.returncode is None, "it has ended"
    except BaseException:
        print(log.read_text())
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait()


class HaProxy:
    """Writes configurations of HAProxy, and runs it with them."""

    def __init__(self, directory: Path, port: Callable[..., int]) -> None:
        self.program = shutil.which("haproxy", path=SEARCHED) or pytest.skip("there is no haproxy")
        self.directory = directory
        self.port = port

    @contextlib.contextmanager
    def in_front_of(
        self, server: str, front: str = "", more: str = ""
    ) -> Iterator[tuple[str, int]]:
        """HAProxy with `server` as the one it knows; its address.

        Args:
            server: the address of a server of ours, and how to talk to it.
            front: what comes behind the address it listens on.
            more: further lines for that.
        """
        address, ready = (LOOPBACK, self.port()), self.port()
        config = self.directory / "haproxy.cfg"
        config.write_text(
            f"""\
            global
                maxconn 200
            defaults
                mode tcp
                timeout connect 10s
                timeout client 30s
                timeout server 30s
            listen front
                bind {LOOPBACK}:{address[1]} {front}
                {more}
                server s {server}
            listen ready
                bind {LOOPBACK}:{ready}
                tcp-request connection reject
"""
        )
        command = [self.program, "-db", "-f", str(config)]
        with running(command, ready, self.directory / "haproxy.log"):
            yield address


class Nginx:
    """The same for nginx's stream module."""

    def __init__(self, directory: Path, port: Callable[..., int]) -> None:
        self.program = shutil.which("nginx", path=SEARCHED) or pytest.skip("there is no nginx")
        self.directory = directory
        self.port = port
        self.load = ""
        if not self._takes("stream {}"):
            about = gevent.subprocess.run([self.program, "-V"], capture_output=True, check=True)
            modules = re.search(r"--modules-path=(\S+)", about.stderr.decode())
            self.load = f"load_module {modules[1] if modules else 'modules'}/ngx_stream_module.so;"
            if not self._takes("stream {}"):
                pytest.skip("nginx has no stream module")

    def _takes(self, lines: str) -> bool:
        command = [*self._command(lines), "-t"]
        result = gevent.subprocess.run(command, capture_output=True, check=False)
        return result.returncode == 0

    def _command(self, lines: str) -> list[str]:
        config = self.directory / "nginx.conf"
        config.write_text(
            f"""
            {self.load}
            daemon off;
            master_process off;
            pid {self.directory}/nginx.pid;
            error_log stderr;
            events {{ worker_connections 200; }}
            {lines}
            """
        )
        return [
            *(self.program, "-c", str(config), "-p", str(self.directory)),
            *("-e", "stderr"),
        ]

    @contextlib.contextmanager
    def in_front_of(
        self, server: str, front: str = "", more: str = ""
    ) -> Iterator[tuple[str, int]]:
        """The same, over nginx."""
        address, ready = (LOOPBACK, self.port()), self.port()
        command = self._command(
            f"""
            stream {{
                server {{
                    listen {LOOPBACK}:{address[1]} reuseport {front};
                    {more}
                    proxy_pass {server};
                    proxy_protocol on;
                }}
                server {{ listen {LOOPBACK}:{ready} reuseport; return ""; }}
            }}
            """
        )
        with running(command, ready, self.directory / "nginx.log"):
            yield address


SEARCHED = ":".join(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/local/bin", "/usr/bin", "/bin"])
"""Debian installs them where only root looks."""


@pytest.fixture
def port() -> Iterator[Callable[..., int]]:
    """Gives ports that nobody takes before the balancer does: bound, by a socket that would share.

    Balancers share their ports too, with other processes of the same user (SO_REUSEPORT).
    """
    with contextlib.ExitStack() as stack:

        def reserve(host: str = LOOPBACK) -> int:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = stack.enter_context(gevent.socket.socket(family))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock.bind((host, 0))
            return int(sock.getsockname()[1])

        yield reserve


@pytest.fixture
def haproxy(tmp_path: Path, port: Callable[..., int]) -> HaProxy:
    return HaProxy(tmp_path, port)


@pytest.fixture
def nginx(tmp_path: Path, port: Callable[..., int]) -> Nginx:
    return Nginx(tmp_path, port)


class Certificates:
    """A server's certificate and a client's, as contexts and as a file."""

    def __init__(self, directory: Path) -> None:
        trustme = pytest.importorskip("trustme")
        authority = trustme.CA()
        issued = authority.issue_cert("localhost")
        self.for_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        issued.configure_cert(self.for_server)
        self.for_client = gevent.ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authority.configure_trust(self.for_client)
        self.pem = directory / "server.pem"
        issued.private_key_and_cert_chain_pem.write_to_path(str(self.pem))
        self.authority = directory / "authority.pem"
        authority.cert_pem.write_to_path(str(self.authority))
        self.of_device = authority.issue_cert("device-7.example", common_name="device-7")


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return Certificates(tmp_path)


class Remember(RecordingCallback):
    """An echo that keeps the sessions of clients, and those of the balancer's own connections."""

    def __init__(self) -> None:
        super().__init__(lambda message: message)
        self.clients: list[PsSession] = []
        self.local: list[PsSession] = []

    def on_open(self, session: PsSession) -> None:
        is_local = session.proxy is not None and session.proxy.is_local
        (self.local if is_local else self.clients).append(session)
        super().on_open(session)


def where(server: PsServer) -> str:
    return f"{LOOPBACK}:{server.address[1]}"


def tls_client(
    address: tuple[str, int], context: gevent.ssl.SSLContext
) -> contextlib.closing[gevent.ssl.SSLSocket]:
    """A client that has shaken hands."""
    sock = gevent.socket.create_connection(address, timeout=10)
    try:
        return contextlib.closing(context.wrap_socket(sock, server_hostname="localhost"))
    except BaseException:
        sock.close()
        raise


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# HAProxy


@pytest.mark.parametrize(("option", "version"), [("send-proxy", 1), ("send-proxy-v2", 2)])
def test_haproxy_tells_who_its_client_is(
    option: str, version: int, haproxy: HaProxy, ps_server: ServerFactory
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    with haproxy.in_front_of(f"{where(server)} {option}") as front, ScriptedClient(front) as client:
        client.send("hello")
        client.expect("hello")
        (session,) = callback.clients
        assert session.remote_endpoint == client.local_endpoint
        assert session.local_endpoint == server.address
        proxy = session.proxy
        assert proxy is not None
        assert (proxy.version, proxy.is_local) == (version, False)
        assert proxy.source == client.local_endpoint
        assert proxy.destination == front
        assert proxy.proxy_endpoint is not None
        assert proxy.proxy_endpoint not in (client.local_endpoint, front)
        assert (proxy.tls, proxy.authority, proxy.unique_id) == (None, None, None)


def test_all_bytes_pass_haproxy_as_they_are(haproxy: HaProxy, ps_server: ServerFactory) -> None:
    server = ps_server(RecordingCallback(lambda message: message), proxy_protocol=True)
    data = bytes(range(256)) * (4 * MIB // 256)
    with haproxy.in_front_of(f"{where(server)} send-proxy-v2") as front:
        for _ in range(3):
            with ScriptedClient(front, timeout=20) as client:
                sending = gevent.spawn(client.socket.sendall, data)
                client.expect(data)
                sending.get()


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
@pytest.mark.parametrize(
    "header",
    [v1(), v2(), with_crc(tlvs=[tlv(2, b"example.org"), tlv(4, bytes(7))])],
    ids=["v1", "v2", "CRC"],
)
def test_a_chain_of_balancers_tells_who_the_first_one_s_client_is(
    header: bytes, option: str, haproxy: HaProxy, ps_server: ServerFactory
) -> None:
    """And what the tests write is what HAProxy reads."""
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    with (
        haproxy.in_front_of(f"{where(server)} {option}", "accept-proxy") as front,
        ScriptedClient(front) as first,
    ):
        first.send(header + b"x")
        first.expect(b"x")
        (session,) = callback.clients
        assert session.remote_endpoint == CLIENT
        assert session.proxy is not None
        assert session.proxy.destination == SERVER


@needs_ipv6
@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
def test_haproxy_tells_of_clients_over_ipv6(
    option: str, haproxy: HaProxy, ps_server: ServerFactory
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    port = haproxy.port("::")
    more = f"bind :::{port} v4v6"
    with haproxy.in_front_of(f"{where(server)} {option}", more=more):
        with ScriptedClient(("::1", port)) as client:
            client.send("x")
            client.expect("x")
            assert callback.clients[0].remote_endpoint == client.local_endpoint
        with ScriptedClient((LOOPBACK, port)) as client:  # one socket for both, in HAProxy
            client.send("x")
            client.expect("x")
            (host, source_port, *_) = callback.clients[1].remote_endpoint or ()
            assert host in (LOOPBACK, f"::ffff:{LOOPBACK}")
            assert client.local_endpoint is not None
            assert source_port == client.local_endpoint[1]


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
def test_haproxy_reaches_us_on_a_unix_socket(
    option: str, haproxy: HaProxy, ps_server: ServerFactory, tmp_path: Path
) -> None:
    callback = Remember()
    path = tmp_path / "s"
    ps_server(callback, host=f"unix:{path}", proxy_protocol=True, trusted_proxies=())
    with haproxy.in_front_of(f"unix@{path} {option}") as front, ScriptedClient(front) as client:
        client.send("x")
        client.expect("x")
        (session,) = callback.clients
        assert session.remote_endpoint == client.local_endpoint


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
def test_a_client_on_a_unix_socket_of_haproxy_has_no_address(
    option: str, haproxy: HaProxy, ps_server: ServerFactory, tmp_path: Path
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    path = str(tmp_path / "front")
    with (
        haproxy.in_front_of(f"{where(server)} {option}", more=f"bind unix@{path}"),
        gevent.socket.socket(socket.AF_UNIX) as sock,
    ):
        eventually(Path(path).exists)  # it comes after the other listeners
        sock.connect(path)
        client = ScriptedClient.from_socket(sock)
        client.send("x")
        client.expect("x")
        (session,) = callback.local + callback.clients
        assert session.proxy is not None
        assert session.proxy.source is None


def test_haproxy_tells_of_the_tls_that_ended_there(
    haproxy: HaProxy, ps_server: ServerFactory, certificates: Certificates
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    certificates.for_client.set_alpn_protocols(["psofa/1"])
    certificates.of_device.configure_cert(certificates.for_client)
    front_options = (
        f"ssl crt {certificates.pem} ca-file {certificates.authority} verify optional alpn psofa/1"
    )
    server_options = (
        "send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,authority,crc32c,unique-id"
    )
    with (
        haproxy.in_front_of(
            f"{where(server)} {server_options}",
            front_options,
            more="unique-id-format connection-%ci:%cp",
        ) as front,
        tls_client(front, certificates.for_client) as client,
    ):
        client.sendall(b"x")
        assert client.recv(10) == b"x"
        (session,) = callback.clients
        assert session.tls is None  # that is not ours
        proxy = session.proxy
        assert proxy is not None
        assert proxy.source == client.getsockname()
        assert proxy.authority == "localhost"
        assert proxy.alpn == "psofa/1"
        assert proxy.unique_id == "connection-{}:{}".format(*client.getsockname()).encode()
        assert proxy.get_tlv(3) is not None  # the checksum, which was right
        assert proxy.tls is not None
        assert proxy.tls.version == client.version()
        assert proxy.tls.cipher == (client.cipher() or [None])[0]
        assert (proxy.tls.cn, proxy.tls.verified) == ("device-7", True)


@pytest.mark.parametrize("has_certificate", [True, False])
def test_a_common_name_is_verified_if_there_is_a_certificate(
    has_certificate: bool,
    haproxy: HaProxy,
    ps_server: ServerFactory,
    certificates: Certificates,
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    if has_certificate:
        certificates.of_device.configure_cert(certificates.for_client)
    options = f"ssl crt {certificates.pem} ca-file {certificates.authority} verify optional"
    with (
        haproxy.in_front_of(f"{where(server)} send-proxy-v2-ssl-cn", options) as front,
        tls_client(front, certificates.for_client) as client,
    ):
        client.sendall(b"x")
        assert client.recv(10) == b"x"
        assert callback.clients[0].proxy is not None
        tls = callback.clients[0].proxy.tls
        assert tls is not None
        assert (tls.cn, tls.verified) == (("device-7", True) if has_certificate else (None, False))


@pytest.mark.parametrize("option", ["send-proxy", "send-proxy-v2"])
def test_tls_passes_haproxy_and_ends_at_us(
    option: str, haproxy: HaProxy, ps_server: ServerFactory, certificates: Certificates
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True, ssl_context=certificates.for_server)
    with haproxy.in_front_of(f"{where(server)} {option}") as front:
        for _ in range(5):
            with tls_client(front, certificates.for_client) as client:
                client.sendall(b"x")
                assert client.recv(10) == b"x"
                session = callback.clients[-1]
                assert session.tls is not None
                assert session.tls.version == client.version()
                assert session.remote_endpoint == client.getsockname()
    assert len(callback.clients) == 5


LOOK = "option tcp-check\ntcp-check connect linger"
"""A check that ends with FIN. The usual one resets before the kernel would let anyone accept it,
unless it has sent a header."""


@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ("send-proxy check", ""),
        ("send-proxy-v2 check", ""),
        ("send-proxy-v2 check", LOOK + " send-proxy"),
        ("send-proxy check check-send-proxy port {port}", ""),
        ("send-proxy-v2 check check-send-proxy port {port}", ""),
        ("send-proxy check port {port}", LOOK),  # without a header
        ("send-proxy-v2 check port {port}", LOOK),
        ("check", LOOK),
    ],
)
def test_health_checks_are_no_failures(
    options: str,
    more: str,
    has_tls: bool,
    haproxy: HaProxy,
    ps_server: ServerFactory,
    certificates: Certificates,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def closed() -> int:
        return sum(each.getMessage().endswith(": closed") for each in caplog.records)

    caplog.set_level(logging.DEBUG, "psofa_gevent")
    callback = Remember()
    server = ps_server(
        callback,
        proxy_protocol="send-proxy" in options,
        ssl_context=certificates.for_server if has_tls else None,
    )
    checks = options.format(port=server.address[1]) + " inter 20ms fall 1"
    with haproxy.in_front_of(f"{where(server)} {checks}", more=more) as front:
        eventually(lambda: closed() >= 10, 20)
        if has_tls or (more == LOOK and "port" in options):
            assert not callback.named("on_open")
            assert not callback.named("on_close")
        if has_tls:
            with tls_client(front, certificates.for_client) as secure:  # it is still UP
                secure.sendall(b"x")
                assert secure.recv(10) == b"x"
        else:
            with ScriptedClient(front) as client:
                client.send("x")
                client.expect("x")
    eventually(lambda: not server.get_session_count())
    assert warnings(caplog) == []


def test_haproxy_s_checks_are_told_from_its_clients(
    haproxy: HaProxy, ps_server: ServerFactory
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    options = "send-proxy-v2 check inter 20ms"
    with (
        haproxy.in_front_of(f"{where(server)} {options}") as front,
        ScriptedClient(front) as client,
    ):
        client.send("x")
        client.expect("x")
        eventually(lambda: len(callback.local) >= 3)
        assert len(callback.clients) == 1
        for session in callback.local:
            assert session.proxy is not None
            assert session.remote_endpoint == session.proxy.proxy_endpoint


def test_the_rules_are_about_the_clients_of_haproxy(
    haproxy: HaProxy, ps_server: ServerFactory
) -> None:
    server = ps_server(
        RecordingCallback(lambda message: message),
        proxy_protocol=True,
        max_sessions_per_peer=2,
        farewell="too many of you",
        denied_networks=["127.0.0.66"],
    )
    with (
        haproxy.in_front_of(f"{where(server)} send-proxy-v2") as front,
        contextlib.ExitStack() as stack,
    ):

        def arrive(host: str) -> ScriptedClient:
            sock = stack.enter_context(gevent.socket.socket())
            sock.bind((host, 0))
            sock.connect(front)
            client = ScriptedClient.from_socket(sock)
            client.send("x")
            return client

        for host in ("127.0.0.1", "127.0.0.1", "127.0.0.2"):
            arrive(host).expect("x")
        assert arrive("127.0.0.1").receive_until_eof() == b"too many of you"
        arrive("127.0.0.2").expect("x")
        with contextlib.suppress(ConnectionResetError):
            assert arrive("127.0.0.66").socket.recv(10) == b""
        assert server.refused[PsRefusal.PEER] == 1
        assert server.refused[PsRefusal.NETWORK] == 1
    eventually(lambda: not server.get_session_count())
    assert server._admission._counts == {}


def test_a_balancer_that_is_not_trusted_is_not_heard(
    haproxy: HaProxy, ps_server: ServerFactory
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True, trusted_proxies=["192.0.2.1"])
    with (
        haproxy.in_front_of(f"{where(server)} send-proxy-v2") as front,
        ScriptedClient(front) as client,
        contextlib.suppress(ConnectionResetError),
    ):
        assert client.socket.recv(10) == b""
    eventually(lambda: server.refused[PsRefusal.PROXY])
    assert callback.clients == []


def test_haproxy_without_the_header_fails(
    haproxy: HaProxy, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    server = ps_server(PsCallback(), proxy_protocol=True)
    with haproxy.in_front_of(where(server)) as front, ScriptedClient(front) as client:
        client.send("GET / HTTP/1.0\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert client.socket.recv(10) == b""
    (message,) = eventually(lambda: warnings(caplog))
    assert "no PROXY protocol: it begins with b'GET / HTTP/1.0" in message


# nginx


def test_nginx_tells_who_its_client_is(nginx: Nginx, ps_server: ServerFactory) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    with nginx.in_front_of(where(server)) as front, ScriptedClient(front) as client:
        client.send("hello")
        client.expect("hello")
        (session,) = callback.clients
        assert session.remote_endpoint == client.local_endpoint
        assert session.proxy is not None
        assert (session.proxy.version, session.proxy.destination) == (1, front)


def test_tls_may_end_at_nginx(
    nginx: Nginx, ps_server: ServerFactory, certificates: Certificates
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    keys = f"ssl_certificate {certificates.pem}; ssl_certificate_key {certificates.pem};"
    with (
        nginx.in_front_of(where(server), "ssl", keys) as front,
        tls_client(front, certificates.for_client) as client,
    ):
        client.sendall(b"x")
        assert client.recv(10) == b"x"
        assert callback.clients[0].remote_endpoint == client.getsockname()
        assert callback.clients[0].tls is None


@pytest.mark.parametrize("more", ["", "ssl_preread on;"], ids=["blind", "preread"])
def test_tls_passes_nginx_and_ends_at_us(
    more: str, nginx: Nginx, ps_server: ServerFactory, certificates: Certificates
) -> None:
    """With `ssl_preread` nginx sends its header and the ClientHello together."""
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True, ssl_context=certificates.for_server)
    with nginx.in_front_of(where(server), more=more) as front:
        for _ in range(5):
            with tls_client(front, certificates.for_client) as client:
                client.sendall(b"x")
                assert client.recv(10) == b"x"
                session = callback.clients[-1]
                assert session.tls is not None
                assert session.remote_endpoint == client.getsockname()


def test_all_bytes_pass_nginx_as_they_are(nginx: Nginx, ps_server: ServerFactory) -> None:
    server = ps_server(RecordingCallback(lambda message: message), proxy_protocol=True)
    data = bytes(range(256)) * (4 * MIB // 256)
    with nginx.in_front_of(where(server)) as front, ScriptedClient(front, timeout=20) as client:
        sending = gevent.spawn(client.socket.sendall, data)
        client.expect(data)
        sending.get()


# The example


def test_the_example_tells_the_clients_of_haproxy_who_they_are(
    haproxy: HaProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = (LOOPBACK, haproxy.port())
    with serving_example("behind_haproxy.py", "--port", "0", "--sessions-per-client", "1") as (
        process,
        address,
    ):
        monkeypatch.setenv("FRONT", "{}:{}".format(*front))
        monkeypatch.setenv("BACK", "{}:{}".format(*address))
        command = [haproxy.program, "-db", "-f", str(EXAMPLE)]
        with running(command, front[1], tmp_path / "haproxy.log"):

            def is_welcome() -> Any:
                """The client that looked whether HAProxy listens may be the one there still."""
                client = ScriptedClient(front)
                assert client.local_endpoint is not None
                try:
                    client.expect(f"you are 127.0.0.1 port {client.local_endpoint[1]}\n")
                except AssertionError:
                    client.close()
                    return None
                return client

            with eventually(is_welcome) as first, ScriptedClient(front) as second:
                first.expect("in HAProxy's log you are ")
                first.send("hello\n")
                assert second.receive_until_eof() == b"there are too many of you\n"
                while "you said hello" not in (line := first.socket.recv(100).decode()):
                    assert line
    assert any("refused: {'PEER':" in line for line in process.lines)
