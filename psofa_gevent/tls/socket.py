"""TLS on a connection: a `TlsSocket` is used like the non-blocking socket below it.

It encrypts and decrypts in memory (`ssl.MemoryBIO`), and does the system calls itself, so it knows
which bytes have left. It makes the promises that a session needs of a socket:

- `TlsSocket.send` returns how many bytes of the message the kernel has taken in encrypted form,
  completely. Encrypted bytes that the kernel has not taken are kept, and `TlsSocket.half_sent` is
  not 0: the next `send` must then be of the same bytes. It gives the kernel the rest before it
  returns the number.
- `TlsSocket.recv` returns decrypted bytes, at most as many as were asked for. If there may be more
  that no event of the socket will announce, `TlsSocket.has_more` is true.
- The peer's close_notify is the end of its stream (`recv` returns nothing). A FIN without
  close_notify means a truncated stream: `ssl.SSLEOFError` (RFC 8446, section 6.1).
- `TlsSocket.close_notify` tells the peer that the stream is complete; `TlsSocket.shutdown` does
  not.

Nothing here waits or switches: a method that can't go on raises `BlockingIOError`, as a socket
does. All errors are `OSError`s, as `ssl.SSLError` is one.
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
"""Bytes of a message that are encrypted for one system call. After sending that many, a session
keeps a buffer a third larger than that, as OpenSSL's memory never shrinks. Four times as many bytes
are not faster."""
MOST_ANSWERS = 4_096
"""Bytes of replies that a peer may cause at a time: 150 key updates (RFC 8446, section 4.6.3). They
cost the peer little and this side much; other implementations allow 16 or 32 updates."""
MOST_UNTAKEN = 4 * ENCRYPTED_AT_A_TIME
"""Encrypted bytes, not taken by the kernel, beyond which the connection fails when its peer causes
still more replies. A message alone never becomes that many."""
RECORD = 16_384
"""Bytes of a TLS record, at most (RFC 8446, section 5.1)."""
OVERHEAD = 2_048
"""Extra bytes of a read, so that one system call brings enough to fill a buffer when decrypted."""
CUTS_PASS_FOR_ENDS = bool(
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).options & getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
)
"""Whether every context takes a FIN for a close_notify: true up to Python 3.11.2 (Debian 12's) on
OpenSSL 3 (CPython's gh-95494). Otherwise a context does so only if the application asks for it."""


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
        # gevent's SSLContext, which a patched process uses, looks in this attribute for the
        # argument of the application's sni_callback, and sets it only for gevent's own sockets.
        self.ssl_object._sslsock = weakref.ref(self.ssl_object)  # type: ignore[attr-defined]  # noqa: SLF001
        self._hello = b""
        """At a server: the first bytes of the client, until the handshake is complete."""
        self.server_name: str | None = None
        """The name that the client asked for (SNI)."""
        if not server_side and server_hostname is not None and not _is_address(server_hostname):
            self.server_name = self.ssl_object.server_hostname
        self._encrypted: bytes | memoryview = b""
        """Encrypted bytes that the kernel has not taken yet."""
        self._taken = 0
        """Bytes of a message that are encrypted, and that no `send` has returned."""
        self._decrypted = b""
        """Decrypted bytes that `recv` has not returned yet."""
        self._at_end = False
        """Whether the peer's close_notify follows these bytes."""
        self._error: OSError | None = None
        """The error that `recv` raises after these bytes."""
        self.has_more = False
        """Whether `recv` may return more without an event of the socket."""
        self.has_progress = False
        """Whether bytes have come that hold no data to receive yet: a part of a record, or a key
        update. Whoever reads this flag resets it."""
        self.watcher: TlsWatcher | None = None
        """The watcher to tell when `has_more` becomes true."""
        self.wire_sent = 0
        """Encrypted bytes that the kernel has taken."""
        self.info: PsTlsInfo | None = None
        """The facts about the handshake, once complete: OpenSSL forgets them after an error."""

    @property
    def half_sent(self) -> int:
        """Bytes of a message that are encrypted, and that no `send` has returned."""
        return self._taken

    def shake_hands(self) -> None:
        """Go on with the handshake, which is complete when this returns.

        Raises:
            BlockingIOError: the handshake waits for the peer or, if `wants_write`, for the kernel.
            ssl.SSLError: it failed. The peer has been sent an alert, if the kernel took it.
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
        """Whether encrypted bytes wait for the kernel."""
        return len(self._encrypted) > 0

    def recv(self, size: int) -> bytes:
        """Decrypted bytes, at most `size`; empty: the peer has closed its stream.

        Usually exactly one record has come. This function handles that case alone, as each further
        call would be felt.

        Raises:
            BlockingIOError: no data has come.
            OSError: TLS or the connection failed.
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
            # No second read: a peer that sends nothing but key updates would hold the hub.
            self.has_progress = True
            raise BlockingIOError(errno.EAGAIN, "no whole record of data has come") from None
        except OSError:
            self._answer()
            raise
        # A read that returned less than was asked for has emptied its record.
        if self._incoming.pending or self._outgoing.pending or not 0 < len(data) < size:
            if CUTS_PASS_FOR_ENDS and not data and not encrypted:
                # A FIN; a close_notify before it would already have ended the stream.
                raise ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF occurred in violation of protocol")
            data = self._collect(size, data)
        return data

    def _recv_kept(self, size: int) -> bytes:
        """`recv` when bytes, the end or an error may be here already; else from the socket."""
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
        """The error to raise. A name for it in the frame that raises it would make a cycle."""
        assert self._error is not None
        error, self._error = self._error, None
        return error

    def _collect(self, size: int, data: bytes | None = None) -> bytes:
        """`data` and the other decrypted bytes that have come, at most `size` bytes.

        Args:
            size: the most bytes to return.
            data: bytes that were read already; empty: the end of the stream was read.

        Returns:
            The bytes. Empty: no whole record has come, or `_at_end` or `_error` was set.
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
            # `recv` raises it after the data before it. Its frames would keep this object alive.
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
        """Decrypted bytes of one record; empty: the stream's end; ``None``: no whole record."""
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
        """Send replies of TLS: key updates, alerts.

        Bytes that the kernel does not take now leave with the next `send`. Too many replies set
        `_error`.
        """
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
        """Encrypt and send some of `data`.

        Returns:
            How many bytes of `data` have left: the kernel took all that they became.

        Raises:
            BlockingIOError: the kernel takes no more now. If `half_sent` is not 0, the next call
                must be of the same bytes.
            OSError: TLS or the connection failed.
        """
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
        """Give the kernel all encrypted bytes, or raise `BlockingIOError` if it can't take them."""
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
        # OpenSSL's second look for the peer's close_notify takes data for a fatal error, so all
        # data is taken out before.
        is_full = True
        while is_full:
            data = self._collect(RECORD)
            self._decrypted += data
            is_full = len(data) == RECORD
        # It raises if the peer has not sent its close_notify yet, and if something is wrong.
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

    # The methods of the socket below

    def fileno(self) -> int:
        """The descriptor; -1 when closed."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the plain socket below. Sends no close_notify."""
        self._sock.close()

    def getsockopt(self, *args: int) -> Any:
        """An option of the socket."""
        return self._sock.getsockopt(*args)

    def setsockopt(self, *args: Any) -> None:
        """Set an option of the socket."""
        self._sock.setsockopt(*args)

    def getsockname(self) -> Any:
        """The local address of the socket."""
        return self._sock.getsockname()

    def setblocking(self, flag: bool) -> None:
        """Set the mode of the socket, which must not block."""
        self._sock.setblocking(flag)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class TlsWatcher:
    """The read watcher of a TLS connection, which also announces bytes in the `TlsSocket`.

    It and the `TlsSocket` hold each other until `close`.
    """

    __slots__ = ("_call", "_loop", "_ready", "_tls", "_watcher")

    def __init__(self, loop: Any, ready: ReadySessions, watcher: Any, tls: TlsSocket) -> None:
        self._loop = loop
        self._ready = ready
        self._watcher = watcher
        self._tls = tls
        self._call: tuple[Callable[..., object], tuple[object, ...]] | None = None
        """The callback and its arguments; None: it does not watch."""
        tls.watcher = self

    def start(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` when there is, or may be, something to receive."""
        self._call = (callback, args)
        self._watcher.start(callback, *args)
        if self._tls.has_more:
            self.tell_soon()

    def tell_soon(self) -> None:
        """Call the callback soon, as no event of the socket announces the bytes to receive."""
        if self._call is not None:
            self._loop.run_callback(self._tell)

    def _tell(self) -> None:
        if self._call is not None:
            callback, args = self._call
            callback(*args)
            self._ready.run_soon()  # without an event of a socket nothing else does that

    def stop(self) -> None:
        """Stop watching."""
        self._call = None
        self._watcher.stop()

    def close(self) -> None:
        """Release the watcher."""
        self._call = None
        self._watcher.close()
        self._tls.watcher = None


@dataclass(frozen=True, slots=True)
class PsTlsInfo:
    """The facts about the TLS of a connection.

    Attributes:
        version: the version of the protocol, such as "TLSv1.3".
        cipher: the name of the cipher.
        server_name: the name that the client asked for (SNI): at a server with several names, the
            name that the client means; ``None``: it asked for no name, as a client does that
            connects to an IP address.
        alpn_protocol: the protocol that both sides agreed on (RFC 7301); ``None``: no protocol.
        peer_certificate: the peer's certificate, DER; ``None``: the peer has sent no certificate.
        peer: the verified certificate as a dictionary (`ssl.SSLSocket.getpeercert`); empty if it
            was not verified, or if Python can't read it.
    """

    version: str | None
    cipher: str | None
    server_name: str | None
    alpn_protocol: str | None
    peer_certificate: bytes | None
    peer: dict[str, Any]

    @classmethod
    def of(cls, tls: TlsSocket) -> PsTlsInfo:
        """The facts about `tls`, whose handshake is complete."""
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
    except (ValueError, ssl.SSLError):  # a name is not UTF-8; the handshake accepts it
        return {}
