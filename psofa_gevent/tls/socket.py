"""TLS on a connection: a `TlsSocket` is used like the non-blocking socket below it.

It encrypts and decrypts in memory (`ssl.MemoryBIO`), and does the system calls itself, so it knows
what has left and what has not. Its promises are those that a session needs of a socket:

- `TlsSocket.send` returns how many bytes the kernel took with all that they became. What was
  encrypted and not taken is kept, and `TlsSocket.half_sent` says so: then the next `send` must be
  of the same bytes, and gives the kernel the rest before it returns their number.
- `TlsSocket.recv` returns what was decrypted, at most as much as was asked for. If more may be left
  that no event of the socket tells of, `TlsSocket.has_more` says so.
- The peer's close_notify is the end of its stream (`recv` returns nothing). A FIN without one is a
  stream that was cut off: `ssl.SSLEOFError` (RFC 8446, section 6.1).
- `TlsSocket.close_notify` says that the stream is complete; `TlsSocket.shutdown` does not.

Nothing here waits or switches: where it can't go on it raises `BlockingIOError`, as a socket does.
All errors are `OSError`s, as `ssl.SSLError` is one.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import ipaddress
import ssl
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from psofa_gevent.hub.ready import ReadySessions
from psofa_gevent.net.addresses import without_zone
from psofa_gevent.tls.client_hello import LONGEST_HELLO, server_name

__all__ = ["PsTlsInfo", "TlsSocket", "TlsWatcher"]

ENCRYPTED_AT_A_TIME = 65_536
"""Bytes of a message that are encrypted for one system call. A session that has sent so much keeps
a third more than that, as OpenSSL's memory never shrinks; four times as much is no faster."""
MOST_ANSWERS = 4_096
"""Bytes that a peer may ask for at a time: 150 key updates (RFC 8446, section 4.6.3). They cost it
little and us much; other implementations allow 16 or 32."""
MOST_UNTAKEN = 4 * ENCRYPTED_AT_A_TIME
"""Bytes encrypted, and not taken by the kernel, beyond which a peer that asks for ever more of them
has failed. A message alone never makes so many."""
RECORD = 16_384
"""Bytes of a TLS record, at most (RFC 8446, section 5.1)."""
OVERHEAD = 2_048
"""Bytes more that are read, so that what fills a buffer when decrypted comes in one system call."""
CUTS_PASS_FOR_ENDS = bool(
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).options & getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
)
"""Whether each context takes a FIN for close_notify: in Python 3.11.2 (Debian 12's) and before, on
OpenSSL 3 (CPython's gh-95494). Elsewhere only where the application asks for it."""


class TlsSocket:
    """A TLS connection, with the methods of a socket that a session uses."""

    __slots__ = (
        "_at_end",
        "_decrypted",
        "_encrypted",
        "_error",
        "_hello",
        "_incoming",
        "_outgoing",
        "_sock",
        "_taken",
        "has_more",
        "has_progress",
        "info",
        "server_name",
        "ssl_object",
        "watcher",
        "wire_sent",
    )

    def __init__(
        self,
        sock: _socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
    ) -> None:
        if server_hostname is not None:
            # A zone names an interface of this machine; no certificate can know of it.
            server_hostname = without_zone(server_hostname)
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
        )
        # There gevent's SSLContext, everybody's in a patched process, looks for the argument of the
        # application's sni_callback; it knows its own sockets only.
        self.ssl_object._sslsock = weakref.ref(self.ssl_object)  # type: ignore[attr-defined]  # noqa: SLF001
        self._hello = b""
        """The beginning of what the client sent, until the handshake is complete; at the server."""
        self.server_name: str | None = None
        """The name that the client asked for (SNI)."""
        if not server_side and server_hostname is not None and not _is_address(server_hostname):
            self.server_name = self.ssl_object.server_hostname
        self._encrypted: bytes | memoryview = b""
        """What the kernel has not taken yet."""
        self._taken = 0
        """Bytes of a message that are in there, and that no `send` has returned."""
        self._decrypted = b""
        """What `recv` has not returned yet."""
        self._at_end = False
        """Whether the peer's close_notify comes after that."""
        self._error: OSError | None = None
        """What comes after that instead."""
        self.has_more = False
        """Whether `recv` may return more without anything coming from the socket."""
        self.has_progress = False
        """Whether bytes have come, since the last look, that are nothing to receive yet."""
        self.watcher: TlsWatcher | None = None
        """What is told of that."""
        self.wire_sent = 0
        """Bytes that the kernel took, as they are on the wire."""
        self.info: PsTlsInfo | None = None
        """What TLS says, when the handshake is complete. OpenSSL forgets it after an error."""

    @property
    def half_sent(self) -> int:
        """Bytes of a message that are encrypted, and of which no `send` has told."""
        return self._taken

    def shake_hands(self) -> None:
        """Go on with the handshake; it is complete when this returns.

        Raises:
            BlockingIOError: it waits for the peer, or, when `wants_write`, for the kernel.
            ssl.SSLError: it failed. The peer has been told, if the kernel took that.
            ConnectionError: the peer closed the connection.
        """
        while True:
            try:
                self.ssl_object.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._flush()
                raise
            else:
                self._flush()
                self.has_more = self._incoming.pending > 0
                if self.ssl_object.server_side:
                    self.server_name = server_name(self._hello)
                    self._hello = b""
                self.info = PsTlsInfo.of(self)
                return
            data = self._sock.recv(RECORD)
            if not data:
                raise ConnectionResetError("the peer closed the connection in the TLS handshake")
            self._incoming.write(data)
            if self.ssl_object.server_side and len(self._hello) < LONGEST_HELLO:
                self._hello += data

    @property
    def wants_write(self) -> bool:
        """Whether something encrypted waits for the kernel."""
        return len(self._encrypted) > 0

    def recv(self, size: int) -> bytes:
        """Decrypted bytes, at most `size`; nothing: the peer has closed its stream.

        Most often one record has come, and nothing else: then this function is all there is to it,
        as each call more would be felt.
        """
        if self.has_more or self._at_end:
            return self._recv_kept(size)
        encrypted = self._sock.recv((size if size > RECORD else RECORD) + OVERHEAD)
        if encrypted:
            self._incoming.write(encrypted)
        else:
            self._incoming.write_eof()
        try:
            data = self.ssl_object.read(size if size < RECORD else RECORD)
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLWantReadError:
            self._answer()
            # Not once more: a peer that sends nothing but key updates would hold the hub.
            self.has_progress = True
            raise BlockingIOError(errno.EAGAIN, "no whole record of data has come") from None
        except OSError:
            self._answer()
            raise
        # A read of less than was asked for has taken all of its record.
        if self._incoming.pending or self._outgoing.pending or not 0 < len(data) < size:
            if CUTS_PASS_FOR_ENDS and not data and not encrypted:
                # A close_notify would have been the end before the FIN came.
                raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")
            data = self._collect(size, data)
        return data

    def _recv_kept(self, size: int) -> bytes:
        """`recv` of what no event of the socket tells of, or of what the socket has."""
        self.has_more = False
        if self._decrypted:
            data, self._decrypted = self._decrypted[:size], self._decrypted[size:]
            self._tell_of_more(has_more=len(self._decrypted) > 0)
            return data
        if self._error is None and not self._at_end:
            data = self._collect(size)
            if data or self._at_end:
                return data
        if self._error is not None:
            self.has_more = False
            raise self._take_error()
        return b"" if self._at_end else self.recv(size)

    def _take_error(self) -> OSError:
        """What is to be raised. In the frame that does it, a name for it would be a cycle."""
        assert self._error is not None
        error, self._error = self._error, None
        return error

    def _collect(self, size: int, data: bytes | None = None) -> bytes:
        """`data`, if there is any, with what else has come, decrypted, at most `size` bytes.

        Nothing: no whole record has come, or what is `_at_end`, or the `_error`.
        """
        parts: list[bytes] = []
        left = size
        try:
            if data is None:
                data = self._next(left)
            elif not data:
                self._at_end = True
            while data:
                parts.append(data)
                left -= len(data)
                data = self._next(left) if left and self._incoming.pending else None
        except OSError as exc:
            # After what came before it. Its frames would keep all that they belong to.
            self._error = exc.with_traceback(None)
        self._answer()
        has_more = not left and (self._incoming.pending > 0 or self.ssl_object.pending() > 0)
        self._tell_of_more(has_more=has_more)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _tell_of_more(self, *, has_more: bool) -> None:
        if has_more or self._at_end or self._error is not None:
            self.has_more = True
            if self.watcher is not None:
                self.watcher.tell_soon()

    def _next(self, size: int) -> bytes | None:
        """Decrypted bytes of one record; nothing: the stream is at its end; ``None``: no record."""
        try:
            data = self.ssl_object.read(size if size < RECORD else RECORD)
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLZeroReturnError:
            data = b""
        if not data:
            self._at_end = True  # close_notify
        return data

    def _answer(self) -> None:
        """Send a key update, an alert: what can't leave now leaves with what is sent next."""
        asked = self._outgoing.pending
        if not asked:
            return
        with contextlib.suppress(OSError):
            self._flush()
        if asked > MOST_ANSWERS:
            self._error = ssl.SSLError(ssl.SSL_ERROR_SSL, "the peer sent too many TLS key updates")
        elif len(self._encrypted) > MOST_UNTAKEN:
            self._error = ssl.SSLError(
                ssl.SSL_ERROR_SSL, "the peer sends TLS key updates but does not read the replies"
            )
        self._tell_of_more(has_more=False)

    def send(self, data: bytes | memoryview) -> int:
        """Encrypt and send some of `data`: how many bytes of it the kernel took all of."""
        if not self._taken:
            if self._encrypted or self._outgoing.pending:
                self._flush()
            if not data:
                return 0
            if len(data) > ENCRYPTED_AT_A_TIME:
                data = memoryview(data)[:ENCRYPTED_AT_A_TIME]
            try:
                self._taken = self.ssl_object.write(data)
            except ssl.SSLWantReadError as exc:
                raise ssl.SSLError(
                    ssl.SSL_ERROR_SSL, "the peer wants to renegotiate, which is not supported"
                ) from exc
        elif len(data) < self._taken:
            raise ssl.SSLError(ssl.SSL_ERROR_SSL, "another message was half sent")
        self._flush()
        taken, self._taken = self._taken, 0
        return taken

    def _flush(self) -> None:
        """Give the kernel all that is encrypted. Raises `BlockingIOError` if that can't be now."""
        if self._outgoing.pending:
            fresh = self._outgoing.read()
            self._encrypted = bytes(self._encrypted) + fresh if self._encrypted else fresh
        while self._encrypted:
            sent = self._sock.send(self._encrypted)
            self.wire_sent += sent
            left = len(self._encrypted) - sent
            self._encrypted = memoryview(self._encrypted)[sent:] if left else b""

    def close_notify(self) -> None:
        """Tell the peer that this is the end of the stream.

        Raises:
            BlockingIOError: the kernel does not take that now: call again.
        """
        # OpenSSL's second look for the peer's own takes data for a fatal error: all out, before.
        is_full = True
        while is_full:
            data = self._collect(RECORD)
            self._decrypted += data
            is_full = len(data) == RECORD
        # It raises where the peer has not sent its own yet, and where something is wrong.
        with contextlib.suppress(OSError, ValueError):
            self.ssl_object.unwrap()
        self.has_more = len(self._decrypted) > 0 or self._at_end or self._error is not None
        try:
            self._flush()
        except BlockingIOError:
            raise
        except OSError:
            pass  # the peer is gone

    def shutdown(self, how: int) -> None:
        """Shut down writing, without close_notify."""
        self._sock.shutdown(how)

    # What is the socket's own

    def fileno(self) -> int:
        """The descriptor; -1 when closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket, as it is."""
        self._sock.close()

    def getsockopt(self, *args: int) -> Any:
        """An option of the socket."""
        return self._sock.getsockopt(*args)

    def setsockopt(self, *args: Any) -> None:
        """Set an option of the socket."""
        self._sock.setsockopt(*args)

    def getsockname(self) -> Any:
        """The socket's own address."""
        return self._sock.getsockname()

    def setblocking(self, flag: bool) -> None:
        """The socket's mode; it must not block."""
        self._sock.setblocking(flag)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class TlsWatcher:
    """The read watcher of a TLS connection: it tells of what is decrypted already, too.

    It and the `TlsSocket` know each other until `close`.
    """

    __slots__ = ("_call", "_loop", "_ready", "_tls", "_watcher")

    def __init__(self, loop: Any, ready: ReadySessions, watcher: Any, tls: TlsSocket) -> None:
        self._loop = loop
        self._ready = ready
        self._watcher = watcher
        self._tls = tls
        self._call: tuple[Callable[..., object], tuple[object, ...]] | None = None
        """What to call, while it watches."""
        tls.watcher = self

    def start(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` when there is, or may be, something to receive."""
        self._call = (callback, args)
        self._watcher.start(callback, *args)
        if self._tls.has_more:
            self.tell_soon()

    def tell_soon(self) -> None:
        """There is something to receive that no event of the socket tells of."""
        if self._call is not None:
            self._loop.run_callback(self._tell)

    def _tell(self) -> None:
        if self._call is not None:
            callback, args = self._call
            callback(*args)
            self._ready.run_soon()  # no event of a socket does that

    def stop(self) -> None:
        """Watch no more."""
        self._call = None
        self._watcher.stop()

    def close(self) -> None:
        """Release the watcher."""
        self._call = None
        self._watcher.close()
        self._tls.watcher = None


@dataclass(frozen=True, slots=True)
class PsTlsInfo:
    """What TLS says of a connection.

    Attributes:
        version: of the protocol: "TLSv1.3".
        cipher: the cipher's name.
        server_name: what the client asked for (SNI): at a server with several names the one that is
            meant; ``None``: it asked for none, as one that connects to an IP address does.
        alpn_protocol: what was agreed on (RFC 7301); ``None``: nothing.
        peer_certificate: the peer's certificate, DER; ``None``: it has shown none.
        peer: the verified certificate as a dictionary (`ssl.SSLSocket.getpeercert`); empty where it
            was not verified, and where Python can't read it.
    """

    version: str | None
    cipher: str | None
    server_name: str | None
    alpn_protocol: str | None
    peer_certificate: bytes | None
    peer: dict[str, Any]

    @classmethod
    def of(cls, tls: TlsSocket) -> PsTlsInfo:
        """What `tls` says."""
        ssl_object = tls.ssl_object
        cipher = ssl_object.cipher()
        return cls(
            version=ssl_object.version(),
            cipher=None if cipher is None else cipher[0],
            server_name=tls.server_name,
            alpn_protocol=ssl_object.selected_alpn_protocol(),
            peer_certificate=ssl_object.getpeercert(binary_form=True),
            peer=_read_certificate(ssl_object),
        )


def _read_certificate(ssl_object: ssl.SSLObject) -> dict[str, Any]:
    try:
        return dict(ssl_object.getpeercert() or {})
    except (ValueError, ssl.SSLError):  # names that are no UTF-8; the handshake takes them
        return {}
