"""Help for tests of callbacks, servers and clients: for users of the library and its own tests.

From the outside in, there are:

- the pytest fixtures `ps_server` and `ps_client`: servers on a free port and scripted clients for
  them, shut down and closed when the test ends. Import them in your ``conftest.py``::

      from psofa_gevent.testing import ps_client, ps_server

  and write ``server = ps_server(MyCallback())`` and ``client = ps_client(server)`` in a test;
- `serving` and `ScriptedClient`: the same without pytest, as context managers;
- `connected_session`: a callback at work on a socket pair, without any port;
- `RecordingCallback`, which records the calls of a callback, and `eventually`, which waits for a
  condition.

All waits go through gevent's hub, whether the process is monkey-patched or not. So a test and the
server under test share one thread, and everything here belongs to that thread. Each wait ends:
after `timeout` seconds it raises an error that says what was expected and what came instead.
pytest itself is imported only when one of the two fixtures is.

This file is longer than others because it is a public module: programs import each name from here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeVar

import gevent
import gevent.socket

from psofa_gevent.callback import PsCallback
from psofa_gevent.enums import PsCloseReason, PsSocketAddressFamily
from psofa_gevent.hub.times import SHORTEST_TIMER
from psofa_gevent.multi_client import PsMultiClient
from psofa_gevent.net.addresses import UnixAddress, check_address, socket_family
from psofa_gevent.net.sockopts import reset
from psofa_gevent.server import PsServer

if TYPE_CHECKING:
    from psofa_gevent.client import PsClient
    from psofa_gevent.session.session import PsSession

    ps_server: Any
    """pytest fixture, a `ServerFactory`: ``server = ps_server(callback, **settings)``.

    Each server is shut down when the test ends; one that still counts a session then fails it.
    """
    ps_client: Any
    """pytest fixture, a `ClientFactory`: ``client = ps_client(server)``.

    Each client is closed when the test ends.
    """

__all__ = [
    "ClientFactory",
    "ConnectedSession",
    "RecordedEvent",
    "RecordingCallback",
    "ScriptedClient",
    "ServerFactory",
    "connected_session",
    "eventually",
    "ps_client",
    "ps_server",
    "serving",
]

POLL_SECONDS = 0.005
"""Seconds between two calls of the condition of `eventually`."""
READ_SIZE = 65_536
SHOWN_BYTES = 200
"""The most bytes that an error shows."""
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""The loopback address by which a client reaches a server that is bound to every address."""

T = TypeVar("T")


def eventually(
    condition: Callable[[], T], timeout: float = 5.0, message: str = "the condition never held"
) -> T:
    """Wait until `condition` returns something true, and return that.

    `condition` is called every few milliseconds, in the calling greenlet; other greenlets run
    meanwhile.

    Args:
        condition: called without arguments; must not block. Its exceptions are passed on.
        timeout: seconds.
        message: the text of the error.

    Raises:
        AssertionError: `condition` returned nothing true for `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (outcome := condition()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"{message} (waited {timeout} s)")
        gevent.sleep(POLL_SECONDS)
    return outcome


class ScriptedClient:
    """One end of a connection, which a test scripts step by step.

    Data is `bytes`, or `str`, which is sent and compared as UTF-8. If the peer does something other
    than the script expects, an `AssertionError` says what; if the peer does nothing for `timeout`
    seconds, a `TimeoutError` says so. As a context manager it is closed at the end.

    Attributes:
        socket: the gevent socket below, for anything that this class lacks.
        timeout: seconds that each step may take.
        local_endpoint: this end's address, which is the session's `remote_endpoint`; `None` for a
            Unix socket. Still known after `close`.
    """

    def __init__(
        self,
        address: tuple[Any, ...],
        *,
        timeout: float = 5.0,
        receive_buffer_size: int | None = None,
    ) -> None:
        """Connect to `address`.

        Args:
            address: host and port, and for IPv6 optionally flow info and scope id, as
                `PsServer.address` has them. A host with a colon in it is taken as IPv6, any other
                as IPv4, and a wildcard address as the loopback address. A Unix socket is ``unix:``
                and its path, with any port.
            timeout: seconds that each step may take, this one included.
            receive_buffer_size: SO_RCVBUF in bytes. A small one makes the peer's sends wait soon.

        Raises:
            TimeoutError: not connected within `timeout`.
            OSError: the connection was refused, or could not be made for another reason. A peer
                that accepts and resets at once does not raise here: `expect_reset` sees it.
        """
        family, name = _socket_address(address)
        sock = gevent.socket.socket(family, gevent.socket.SOCK_STREAM)
        try:
            if receive_buffer_size is not None:
                # Before the connect: both ends fix the window scale in the handshake.
                sock.setsockopt(
                    gevent.socket.SOL_SOCKET, gevent.socket.SO_RCVBUF, receive_buffer_size
                )
            sock.settimeout(timeout)
            is_reset = _connect(sock, name)
        except BaseException:
            sock.close()
            raise
        self._take_over(sock, timeout)
        self._reset_seen = is_reset

    @classmethod
    def from_socket(cls, sock: gevent.socket.socket, *, timeout: float = 5.0) -> Self:
        """Script a connected gevent socket: an accepted one, say, to play the server."""
        client = cls.__new__(cls)
        client._take_over(sock, timeout)  # noqa: SLF001 - of this class
        return client

    def _take_over(self, sock: gevent.socket.socket, timeout: float) -> None:
        self.socket = sock
        self.timeout = timeout
        name = sock.getsockname()
        self.local_endpoint: tuple[Any, ...] | None = name if isinstance(name, tuple) else None
        # A call that fails with the reset takes it off the socket, and the next read returns EOF.
        self._reset_seen = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ScriptedClient {self.local_endpoint}>"

    def send(self, data: str | bytes) -> None:
        """Send all of `data`.

        Raises:
            TimeoutError: the peer did not take all of it within `timeout`.
            ConnectionError: the peer has reset the connection, or `eof` was called before.
        """
        message = _to_bytes(data)
        self.socket.settimeout(self.timeout)
        try:
            self.socket.sendall(message)
        except TimeoutError as error:
            raise TimeoutError(
                f"send({_shown(message)}): not all of it was taken within {self.timeout} s"
            ) from error
        except ConnectionResetError:
            self._reset_seen = True
            raise

    def eof(self) -> None:
        """Half-close: send FIN. Data from the peer can still be received."""
        self.socket.shutdown(gevent.socket.SHUT_WR)

    def reset(self) -> None:
        """Close with RST, as a crashed peer's host or an impatient program does.

        Raises:
            ValueError: this is not a TCP connection.
        """
        if self.local_endpoint is None:
            raise ValueError(
                "reset() needs a TCP connection, a Unix socket has no RST: use serving()"
            )
        reset(self.socket)

    def close(self) -> None:
        """Close the socket. The kernel sends RST if bytes are left unread, else FIN, as always."""
        self.socket.close()

    def expect(self, data: str | bytes) -> None:
        """Read exactly `data`, in as many reads as it takes, and not a byte more."""
        expected = _to_bytes(data)
        self._read(len(expected), f"expected {_shown(expected)}", expected)

    def receive(self, count: int) -> bytes:
        """Read `count` bytes, in as many reads as it takes."""
        return self._read(count, f"expected {count} bytes", None)

    def receive_until_eof(self) -> bytes:
        """Read all bytes up to the peer's FIN."""
        received = bytearray()
        deadline = self._deadline()
        while chunk := self._next(READ_SIZE, deadline, "expected EOF in the end", received):
            received += chunk
        return bytes(received)

    def expect_eof(self) -> None:
        """Wait for the peer's FIN; any byte before it fails the step."""
        if chunk := self._next(READ_SIZE, self._deadline(), "expected EOF", b""):
            raise AssertionError(f"expected EOF, got {_shown(chunk)}")

    def expect_reset(self) -> None:
        """Wait for the peer's RST. Bytes before it are skipped, as the RST may overtake them."""
        wanted = "expected a reset"
        received = bytearray()
        deadline = self._deadline()
        while not self._reset_seen:
            try:
                chunk = self._receive_some(READ_SIZE, deadline, wanted, received)
            except ConnectionResetError:
                return
            if not chunk:
                raise AssertionError(f"{wanted}, got {_shown(received)} and then EOF")
            received += chunk

    def expect_nothing(self, seconds: float = 0.1) -> None:
        """Check that nothing comes for `seconds`: no byte, no EOF, no reset."""
        wanted = f"expected nothing for {seconds} s"
        self.socket.settimeout(seconds)
        try:
            chunk = self.socket.recv(READ_SIZE)
        except TimeoutError:
            return
        except ConnectionResetError as error:
            raise AssertionError(f"{wanted}, got a reset") from error
        end = "a reset" if self._reset_seen else "EOF"
        raise AssertionError(f"{wanted}, got {_shown(chunk) if chunk else end}")

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout

    def _read(self, count: int, wanted: str, expected: bytes | None) -> bytes:
        received = bytearray()
        deadline = self._deadline()
        while len(received) < count:
            chunk = self._next(count - len(received), deadline, wanted, received)
            if not chunk:
                raise AssertionError(f"{wanted}, got {_shown(received)} and then EOF")
            # Compared piece by piece, so that a wrong byte fails at once, and not at the timeout.
            differs = expected is not None and not expected.startswith(chunk, len(received))
            received += chunk
            if differs:
                raise AssertionError(f"{wanted}, got {_shown(received)}")
        return bytes(received)

    def _next(self, limit: int, deadline: float, wanted: str, received: bytes | bytearray) -> bytes:
        try:
            chunk = self._receive_some(limit, deadline, wanted, received)
        except ConnectionResetError as error:
            raise AssertionError(f"{wanted}, got {_shown(received)} and then a reset") from error
        if self._reset_seen and not chunk:
            raise AssertionError(f"{wanted}, got {_shown(received)} and then a reset")
        return chunk

    def _receive_some(
        self, limit: int, deadline: float, wanted: str, received: bytes | bytearray
    ) -> bytes:
        # Never 0, which would mean "non-blocking": even past the deadline, bytes that have come
        # count.
        self.socket.settimeout(max(deadline - time.monotonic(), SHORTEST_TIMER))
        try:
            chunk: bytes = self.socket.recv(limit)
        except TimeoutError as error:
            raise TimeoutError(
                f"{wanted}, got {_shown(received)} and then nothing within {self.timeout} s"
            ) from error
        return chunk


def _connect(sock: gevent.socket.socket, name: Any) -> bool:
    """Connect, and return whether the peer has reset the connection since.

    A peer that accepts and resets at once may do both before connect(2) has returned; then
    connect(2) fails with the reset. A connection that no listener takes fails with ECONNREFUSED.
    """
    try:
        sock.connect(name)
    except (ConnectionResetError, BrokenPipeError):  # BrokenPipeError comes after a FIN
        return True
    return False


def _socket_address(address: tuple[Any, ...]) -> tuple[int, Any]:
    """The family of a socket, and the address it connects to. Switches while it resolves a name."""
    host, port, *rest = address
    host = WILDCARDS.get(host, host)
    is_ipv6 = ":" in str(host)
    family = PsSocketAddressFamily.IPV6 if is_ipv6 else PsSocketAddressFamily.IPV4
    checked = check_address(host, port, family, least_port=0)
    if isinstance(checked, UnixAddress):
        return gevent.socket.AF_UNIX, checked.path
    return socket_family(family), (host, port, *rest) if rest else checked.resolve()[0]


def _to_bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else bytes(data)


def _shown(data: bytes | bytearray) -> str:
    if not data:
        return "nothing"
    if len(data) <= SHOWN_BYTES:
        return repr(bytes(data))
    return f"{bytes(data[:SHOWN_BYTES])!r}… ({len(data)} bytes)"


@contextlib.contextmanager
def serving(
    callback: PsCallback, *, host: str | None = None, port: int = 0, **settings: Any
) -> Iterator[PsServer]:
    """Start a server, and shut it down at the end of the ``with`` block.

    Args:
        callback: the server's callback.
        host: by default the loopback address of the socket address family.
        port: 0 asks for a free port: see ``server.address``. With a ``listener``, host and port are
            ignored.
        **settings: the other settings of `PsServer`.

    Raises:
        AssertionError: at the end, if the server still counts sessions after its shutdown.
    """
    if host is None:
        ipv6 = settings.get("socket_address_family") is PsSocketAddressFamily.IPV6
        host = "::1" if ipv6 else "127.0.0.1"
    if settings.get("listener") is None:
        settings |= {"host": host, "port": port}
    server = PsServer(callback, **settings)
    with server:
        yield server
    if left := server.get_session_count():
        raise AssertionError(f"{left} sessions are left after the shutdown of {server!r}")


@dataclasses.dataclass(frozen=True)
class ConnectedSession:
    """The two ends of a connection: what `connected_session` yields.

    Attributes:
        session: the library's end of the connection.
        peer: the other end.
    """

    session: PsSession
    peer: ScriptedClient


@contextlib.contextmanager
def connected_session(
    callback: PsCallback, *, timeout: float = 5.0, **session_settings: Any
) -> Iterator[ConnectedSession]:
    """Run a callback on one end of a connected socket pair: no port, no network.

    The session's owner is a `PsMultiClient`. The session's endpoints are `None` where socket pairs
    are Unix sockets. At the end of the ``with`` block a session that is still open closes with
    `PsCloseReason.SELF_CLOSE`; its ``on_close`` has run when the block is left.

    Args:
        callback: the callback of the session.
        timeout: seconds that each step of the peer may take.
        **session_settings: settings of `PsMultiClient`.
    """
    near, far = gevent.socket.socketpair()
    with (
        ScriptedClient.from_socket(far, timeout=timeout) as peer,
        contextlib.closing(near),
        PsMultiClient(callback, **session_settings) as bundle,
    ):
        session = bundle._adopt(near)  # noqa: SLF001 - to adopt a socket is not public
        try:
            yield ConnectedSession(session, peer)
        finally:
            # The session first, so that SELF_CLOSE is the reason. Then the peer, so that the
            # session does not linger.
            session.close()
            peer.close()


class RecordedEvent(NamedTuple):
    """One call of a callback method.

    Attributes:
        name: the method, without ``_async``: ``"on_message"``.
        session: `None` for ``on_start`` and ``on_stop``.
        value: the message, the close reason, or the owner; `None` for ``on_open`` and ``on_eof``.
    """

    name: str
    session: PsSession | None
    value: bytes | PsCloseReason | PsServer | PsClient | PsMultiClient | None


class RecordingCallback(PsCallback):
    """Records the calls of its methods, with their arguments, in order; may answer messages.

    Attributes:
        events: all calls so far, in order, of all sessions.
    """

    def __init__(
        self,
        reply: Callable[[bytes], str | bytes] | None = None,
        *,
        use_async_callback: bool = False,
    ) -> None:
        """Start with an empty record.

        Args:
            reply: a function that returns the answer to a message, which is then sent:
                ``lambda message: message`` is an echo.
            use_async_callback: be an async callback; the record is the same.
        """
        self.use_async_callback = use_async_callback
        self.events: list[RecordedEvent] = []
        self._reply = reply

    def wait_for(
        self, name: str, count: int = 1, timeout: float = 5.0, session: PsSession | None = None
    ) -> list[RecordedEvent]:
        """Wait until `name` was called `count` times, and return those calls (more, if more came).

        Args:
            name: the method, without ``_async``.
            count: calls since the beginning, not since the last wait.
            timeout: seconds.
            session: count the calls for this one only.

        Raises:
            AssertionError: too few calls within `timeout`; the error lists the calls.
        """
        try:
            eventually(lambda: len(self.named(name, session)) >= count, timeout)
        except AssertionError:
            called = [event.name for event in self.events]
            raise AssertionError(
                f"expected {count} calls of {name} within {timeout} s, got {called}"
            ) from None
        return self.named(name, session)

    def named(self, name: str, session: PsSession | None = None) -> list[RecordedEvent]:
        """The calls of `name` so far, of one session or of all."""
        return [
            event
            for event in self.events
            if event.name == name and session in (None, event.session)
        ]

    def received(self, session: PsSession | None = None) -> bytes:
        """The bytes of all messages so far, of one session or of all."""
        return b"".join(
            event.value
            for event in self.named("on_message", session)
            if isinstance(event.value, bytes)
        )

    def on_open(self, session: PsSession) -> None:
        self.events.append(RecordedEvent("on_open", session, None))

    def on_message(self, session: PsSession, message: bytes) -> None:
        self.events.append(RecordedEvent("on_message", session, message))
        if self._reply is not None:
            session.send(self._reply(message))

    def on_eof(self, session: PsSession) -> None:
        self.events.append(RecordedEvent("on_eof", session, None))

    def on_close(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.events.append(RecordedEvent("on_close", session, close_reason))

    def on_start(self, owner: PsServer | PsClient | PsMultiClient) -> None:
        self.events.append(RecordedEvent("on_start", None, owner))

    def on_stop(self, owner: PsServer | PsClient | PsMultiClient) -> None:
        self.events.append(RecordedEvent("on_stop", None, owner))

    async def on_open_async(self, session: PsSession) -> None:
        self.on_open(session)

    async def on_message_async(self, session: PsSession, message: bytes) -> None:
        self.events.append(RecordedEvent("on_message", session, message))
        if self._reply is not None:
            await session.send_async(self._reply(message))

    async def on_eof_async(self, session: PsSession) -> None:
        self.on_eof(session)

    async def on_close_async(self, session: PsSession, close_reason: PsCloseReason) -> None:
        self.on_close(session, close_reason)

    async def on_start_async(self, owner: PsServer | PsClient | PsMultiClient) -> None:
        self.on_start(owner)

    async def on_stop_async(self, owner: PsServer | PsClient | PsMultiClient) -> None:
        self.on_stop(owner)


class ServerFactory(Protocol):
    """The type of the fixture `ps_server`."""

    def __call__(self, callback: PsCallback[Any], **settings: Any) -> PsServer:
        """Start a server as `serving` does."""


class ClientFactory(Protocol):
    """The type of the fixture `ps_client`."""

    def __call__(
        self,
        server: PsServer | tuple[Any, ...],
        *,
        timeout: float = 5.0,
        receive_buffer_size: int | None = None,
    ) -> ScriptedClient:
        """Connect a `ScriptedClient` to a server, or to an address."""


def _start_servers() -> Iterator[ServerFactory]:
    """Starts servers on free ports: ``server = ps_server(callback, **settings)``."""
    with contextlib.ExitStack() as servers:

        def start(callback: PsCallback[Any], **settings: Any) -> PsServer:
            return servers.enter_context(serving(callback, **settings))

        yield start


def _connect_clients() -> Iterator[ClientFactory]:
    """Connects scripted clients: ``client = ps_client(server)``."""
    with contextlib.ExitStack() as clients:

        def connect(
            server: PsServer | tuple[Any, ...],
            *,
            timeout: float = 5.0,
            receive_buffer_size: int | None = None,
        ) -> ScriptedClient:
            address = server.address if isinstance(server, PsServer) else server
            return clients.enter_context(
                ScriptedClient(address, timeout=timeout, receive_buffer_size=receive_buffer_size)
            )

        yield connect


_FIXTURES: dict[str, Callable[[], Iterator[Any]]] = {
    "ps_server": _start_servers,
    "ps_client": _connect_clients,
}

if not TYPE_CHECKING:  # for a type checker, a module with a __getattr__ has every name

    def __getattr__(name: str) -> object:
        """Make a fixture when it is imported for the first time, as only then pytest is needed."""
        if name not in _FIXTURES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            pytest = importlib.import_module("pytest")
        except ImportError as error:
            raise ImportError(
                f"the fixture {name} needs pytest: pip install 'psofa_gevent[testing]'"
            ) from error
        fixture = pytest.fixture(name=name)(_FIXTURES[name])
        globals()[name] = fixture
        return fixture
