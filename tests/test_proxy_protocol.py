"""The PROXY protocol: the client's address is told, never guessed, and no byte gets lost.

First the parser, without a socket; then servers behind a scripted load balancer. Behind real ones:
tests/whole/test_balancers.py.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import gevent
import gevent.socket
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import close_reasons, echo, takes
from marks import needs_ipv6
from proxy_headers import CLIENT, LOCAL, SERVER, tls_tlv, tlv, v1, v2, with_crc
from psofa_gevent import (
    PsCallback,
    PsCloseReason,
    PsHandler,
    PsProxyInfo,
    PsProxyTls,
    PsRefusal,
    PsServer,
    PsSession,
    PsSocketAddressFamily,
)
from psofa_gevent.framing import Line
from psofa_gevent.proxy_protocol import V2_SIGNATURE, crc32c, parse
from psofa_gevent.testing import (
    RecordingCallback,
    ScriptedClient,
    ServerFactory,
    eventually,
)

CLIENT6 = ("2001:db8::7", 50_123, 0, 0)
SERVER6 = ("2001:db8::1", 443, 0, 0)
UNKNOWN = b"PROXY UNKNOWN\r\n"
AWS_HEALTH_CHECK = bytes.fromhex("0d0a0d0a000d0a515549540a20110054030004bce5951f04004a") + bytes(74)
"""As users have dumped it: LOCAL, TCP over IPv4, and TLVs where the addresses would be."""
GOOD_HEADERS = {
    "v1 TCP4": v1(),
    "v1 TCP6": v1(CLIENT6, SERVER6),
    "v1 longest": v1(("ffff:" * 7 + "ffff", 65_535), ("ffff:" * 7 + "ffff", 65_535)),
    "v1 UNKNOWN": UNKNOWN,
    "v1 UNKNOWN longest": b"PROXY UNKNOWN " + b"f" * 91 + b"\r\n",
    "v2 TCP4": v2(),
    "v2 TCP6": v2(CLIENT6, SERVER6),
    "v2 Unix": v2(b"/run/client", b"/run/server"),
    "v2 LOCAL": LOCAL,
    "v2 of AWS": AWS_HEALTH_CHECK,
    "v2 TLVs": with_crc(tlvs=[tlv(2, b"example.org"), tlv(4, bytes(5_000)), tlv(5, b"id")]),
    "v2 largest": v2(tlvs=[tlv(4, bytes(65_535 - 12 - 3))]),
}


def header_of(data: bytes) -> PsProxyInfo:
    """The header that is all of `data`."""
    found = parse(data)
    assert found is not None
    info, size = found
    assert size == len(data)
    return info


# What a header says


def test_v1_tells_source_and_destination() -> None:
    info = header_of(b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n")
    assert info == PsProxyInfo(1, False, ("192.168.0.1", 56324), ("192.168.0.11", 443))
    info = header_of(b"PROXY TCP6 2001:DB8:0:0::7 ::1 0 65535\r\n")
    assert info == PsProxyInfo(1, False, ("2001:db8::7", 0, 0, 0), ("::1", 65535, 0, 0))
    # As glibc writes what a dual-stack socket has.
    assert header_of(v1(("::ffff:192.0.2.1", 1), ("::1", 2))).source == (
        *("::ffff:192.0.2.1", 1),
        *(0, 0),
    )


@pytest.mark.parametrize("rest", [b"", b" ", b" TCP4 x y", b" ffff:f...f:ffff \xff\0 1"])
def test_v1_unknown_tells_nothing_whatever_it_has_behind_it(rest: bytes) -> None:
    assert header_of(b"PROXY UNKNOWN" + rest + b"\r\n") == PsProxyInfo(1, True, None, None)


def test_v2_tells_source_and_destination() -> None:
    assert header_of(v2()) == PsProxyInfo(2, False, CLIENT, SERVER)
    assert header_of(v2(CLIENT6, SERVER6)) == PsProxyInfo(2, False, CLIENT6, SERVER6)
    assert header_of(v2(family=0x12)) == PsProxyInfo(2, False, CLIENT, SERVER)  # UDP, at the client
    info = header_of(v2(b"/run/client", b"\0abstract"))
    assert (info.source, info.destination) == (("unix:/run/client", 0), ("unix:@abstract", 0))
    info = header_of(v2(b"", b"x" * 108))
    assert (info.is_local, info.source) == (False, None)
    assert info.destination == ("unix:" + "x" * 108, 0)


@pytest.mark.parametrize(
    "header",
    [
        LOCAL,
        v2(command=0),  # with addresses, which do not count
        v2(command=0, family=0xF5),  # nor does the family
        v2(None, command=0, tlvs=[b"anything at all"]),
        v2(None, family=0),
        v2(None, family=0x01),
        v2(family=0x10),  # an unspecified transport
        v2(None, family=0, tlvs=[b"\xff"]),
    ],
)
def test_v2_local_and_unspecified_tell_of_no_client(header: bytes) -> None:
    info = header_of(header)
    assert (info.is_local, info.source, info.destination) == (True, None, None)


FAMILIES = {"UNSPEC": (0x00, 0), "INET": (0x11, 12), "INET6": (0x21, 36), "UNIX": (0x31, 216)}
"""Each with the size of its addresses."""


def local_header(family: int, block: bytes, *, crc: bool = False) -> bytes:
    """LOCAL, with its checksum behind the block if it shall have one."""
    if not crc:
        return V2_SIGNATURE + bytes([0x20, family]) + len(block).to_bytes(2, "big") + block
    blank = local_header(family, block + tlv(3, bytes(4)))
    return blank[:-4] + crc32c(blank).to_bytes(4, "big")


def test_the_health_check_of_aws_is_read() -> None:
    info = header_of(AWS_HEALTH_CHECK)
    assert info == PsProxyInfo(
        2, True, None, None, tlvs=((3, bytes.fromhex("bce5951f")), (4, bytes(74)))
    )


@pytest.mark.parametrize("has_addresses", [True, False])
@pytest.mark.parametrize("crc", [True, False])
@pytest.mark.parametrize(("family", "size"), FAMILIES.values(), ids=FAMILIES)
def test_tlvs_of_a_local_header_are_found_with_addresses_and_without(
    family: int, size: int, crc: bool, has_addresses: bool
) -> None:
    for addresses in (bytes(size), b"\x01\0\x02" * (size // 3)):
        block = addresses if has_addresses else b""
        block += tlv(2, b"example.org") + tlv(4, bytes(300)) + tlv(5, b"id")
        info = header_of(local_header(family, block, crc=crc))
        assert info.is_local
        assert [kind for kind, _ in info.tlvs] == [2, 4, 5] + [3] * crc
        assert (info.authority, info.unique_id) == ("example.org", b"id")


@pytest.mark.parametrize(("family", "size"), FAMILIES.values(), ids=FAMILIES)
def test_a_local_header_is_taken_whatever_it_has(family: int, size: int) -> None:
    for length in {0, 1, 2, 3, size - 1, size, size + 1, size + 3, 300, 65_535} - {-1}:
        for fill in (b"\0", b"\x03", b"\x20", b"\xff"):
            header = local_header(family, fill * length)
            info = header_of(header)
            assert (info.is_local, info.source, info.destination) == (True, None, None)
    for odd in (tlv(3, b""), tlv(3, b"12345"), tlv(3, bytes(4)) * 2, tlv(0x20, b"")):
        assert header_of(local_header(family, odd)).tlvs == ()
        assert header_of(local_header(family, bytes(size) + odd)).is_local


@pytest.mark.parametrize(("family", "size"), FAMILIES.values(), ids=FAMILIES)
def test_a_local_header_whose_only_tlvs_have_a_wrong_checksum_is_refused(
    family: int, size: int
) -> None:
    header = local_header(family, b"\xff" * size + tlv(2, b"example.org"), crc=True)
    with pytest.raises(ValueError, match="wrong checksum"):
        parse(header[:-1] + bytes([header[-1] ^ 1]))


@given(
    st.sampled_from([0x00, 0x10, 0x11, 0x21, 0x31, 0xF5]),
    st.binary(max_size=400).filter(lambda block: 3 not in block),
)
def test_no_local_header_without_a_checksum_is_refused(family: int, block: bytes) -> None:
    assert header_of(local_header(family, block)).is_local


def test_a_balancer_s_own_endpoint_is_kept() -> None:
    for header in (v1(), v2(), LOCAL, UNKNOWN):
        found = parse(header, ("10.0.0.1", 1))
        assert found is not None
        assert found[0].proxy_endpoint == ("10.0.0.1", 1)


def test_tlvs_are_told_as_they_came_and_by_their_names() -> None:
    info = header_of(
        v2(
            tlvs=[
                tlv(2, "bücher.example".encode()),
                tlv(1, b"h2"),
                tlv(5, b"\xff\0"),
                tlv(4, b""),
                tlv(0xE0, b"ours"),
                tlv(0xE0, b"second"),
            ]
        )
    )
    assert info.authority == "bücher.example"
    assert info.alpn == "h2"
    assert info.unique_id == b"\xff\0"
    assert info.get_tlv(0xE0) == b"ours"
    assert info.get_tlv(0xE1) is None
    assert info.tlvs[3:] == ((4, b""), (0xE0, b"ours"), (0xE0, b"second"))
    assert info.tls is None
    nothing = header_of(v1())
    assert (nothing.authority, nothing.alpn, nothing.unique_id, nothing.tls) == (None,) * 4
    assert header_of(v2(tlvs=[tlv(2, b"\xff")])).authority == r"\xff"


def test_tls_that_ended_at_the_balancer_is_told() -> None:
    parts = tlv(0x21, b"TLSv1.3"), tlv(0x22, b"device-7"), tlv(0x23, b"TLS_AES_256_GCM_SHA384")
    info = header_of(v2(tlvs=[tls_tlv(0x07, 0, *parts)]))
    assert info.tls == PsProxyTls("TLSv1.3", "TLS_AES_256_GCM_SHA384", "device-7", verified=True)
    assert header_of(v2(tlvs=[tls_tlv(0x00, 0)])).tls is None  # the client came without TLS


@pytest.mark.parametrize(("client", "verify"), [(0x07, 1), (0x07, 1 << 24), (0x01, 0), (0x01, 1)])
def test_a_client_is_not_verified_without_a_certificate_that_was(client: int, verify: int) -> None:
    tls = header_of(v2(tlvs=[tls_tlv(client, verify, tlv(0x22, b"admin"))])).tls
    assert tls is not None
    assert not tls.verified


def test_the_checksum_is_that_of_the_rfc() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the polynomial
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4


@pytest.mark.parametrize("tlvs", [[], [tlv(2, b"example.org"), tlv(4, b"xyz")]])
@pytest.mark.parametrize("command", [0, 1])
def test_a_checksum_that_is_there_is_verified(tlvs: list[bytes], command: int) -> None:
    header = with_crc(tlvs=tlvs, command=command)
    assert header_of(header).is_local is (command == 0)
    for at in range(16, len(header) - 7):  # addresses and values; not what a header is told by
        if header[at] != 0x20:
            broken = bytearray(header)
            broken[at] ^= 1
            with contextlib.suppress(ValueError):
                assert header_of(bytes(broken)).get_tlv(3) is None, at
    with pytest.raises(ValueError, match="checksum"):
        parse(header[:-1] + bytes([header[-1] ^ 1]))


# How a header is read


@pytest.mark.parametrize("header", GOOD_HEADERS.values(), ids=GOOD_HEADERS)
def test_a_header_is_whole_with_its_last_byte_and_takes_no_more(header: bytes) -> None:
    cuts = range(len(header)) if len(header) < 6_000 else [*range(300), len(header) - 1]
    for cut in cuts:
        assert parse(header[:cut]) is None, cut
    whole = parse(header)
    assert whole is not None
    for more in (b"\r\n", b"\x16\x03\x01", header, V2_SIGNATURE, bytes(70_000)):
        assert parse(header + more) == whole
        assert parse(bytearray(header + more)) == whole


BAD_V1 = [
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\n",
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r",
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\r\n",
    b"PROXY UNKNOWN\n",
    b"PROXY UNKNOWN a\rb\r\n",
    b"PROXY UNKNOWN a\nb\r\n",
    b"PROXY UNKNOWNX\r\n",
    b"PROXY  TCP4 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY\tTCP4 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP4  1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 \r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 1 1\r\n",
    b"PROXY TCP4\r\n",
    b"PROXY \r\n",
    b"PROXY tcp4 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY UDP4 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 ::1 ::1 1 1\r\n",
    b"PROXY TCP6 1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP6 ::1 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 1.2.3.04 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 1.2.3 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 1.2.3.256 1.2.3.4 1 1\r\n",
    b"PROXY TCP4 0x1.2.3.4 1.2.3.4 1 1\r\n",
    b"PROXY TCP6 fe80::1%1 ::1 1 1\r\n",
    b"PROXY TCP6 ::1::2 ::1 1 1\r\n",
    b"PROXY TCP6 1:2:3:4:5:6:7 ::1 1 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 01 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1 00\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 -1 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 +1 1\r\n",
    b"PROXY TCP4 1.2.3.4 1.2.3.4 1_0 1\r\n",
    "PROXY TCP4 1.2.3.4 1.2.3.4 ١ 1\r\n".encode(),  # noqa: RUF001 - another script's digit
    b"PROXY UNKNOWN " + b"f" * 92 + b"\r\n",  # 108 bytes
    b"PROXY UNKNOWN " + b"f" * 1_000,
]
BAD_V2 = [
    V2_SIGNATURE + b"\x11\x11\0\x0c" + bytes(12),  # version 1
    V2_SIGNATURE + b"\x31\x11\0\x0c" + bytes(12),
    V2_SIGNATURE + b"\x22\x11\0\x0c" + bytes(12),  # no such command
    V2_SIGNATURE + b"\x2f\x11\0\x0c" + bytes(12),
    v2(family=0x41),
    v2(family=0xF1),
    v2(family=0x13),
    v2(family=0x1F),
    v2(family=0x21),  # IPv6 in 12 bytes
    v2(family=0x31),
    V2_SIGNATURE + b"\x21\x11\0\x0b" + bytes(11),
    V2_SIGNATURE + b"\x21\x11\0\0",
    v2(tlvs=[b"\x04"]),
    v2(tlvs=[b"\x04\0"]),
    v2(tlvs=[b"\x04\0\x01"]),
    v2(tlvs=[tlv(4, b"x"), b"\xea\xff\xff"]),
    v2(tlvs=[tlv(3, b"123")]),
    v2(tlvs=[tlv(3, b"12345")]),
    v2(tlvs=[tlv(3, bytes(4))]),
    v2(tlvs=[tlv(3, bytes(4)), tlv(3, bytes(4))]),
    v2(tlvs=[tlv(0x20, bytes(4))]),
    v2(tlvs=[tls_tlv(1, 0, b"\x21\0\x09TLSv1.3")]),
]
NO_HEADERS = [
    *(
        b"GET / HTTP/1.1\r\n",
        b"\x16\x03\x01\x02\0",
        b"proxy TCP4",
        b"PROXY1",
        b"\r\n\r\n\0\r\nQUIX",
    ),
    *(b"\r\n\r\n\r\n", b" PROXY", b"\0", b"PROX\n"),
]


@pytest.mark.parametrize("data", BAD_V1 + BAD_V2 + NO_HEADERS)
def test_a_bad_header_is_refused_and_told(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"PROXY"):
        parse(data + b"more of it")


@pytest.mark.parametrize("data", [*NO_HEADERS, *BAD_V2[:10]])
def test_what_can_be_no_header_is_refused_without_the_rest(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"PROXY"):
        parse(data[:16])


@given(st.one_of(st.binary(max_size=300), st.sampled_from(list(GOOD_HEADERS.values())[:10])))
def test_no_bytes_raise_anything_but_value_error(data: bytes) -> None:
    for start in (b"", b"PROXY ", b"PROXY TCP4 ", b"PROXY TCP6 ", V2_SIGNATURE + b"\x21"):
        with contextlib.suppress(ValueError):
            parse(start + data)


@given(
    st.sampled_from([header for header in GOOD_HEADERS.values() if len(header) < 300]),
    st.integers(0, 299),
    st.integers(0, 255),
    st.binary(max_size=5),
)
def test_a_header_with_a_wrong_byte_is_taken_or_refused(
    header: bytes, at: int, byte: int, more: bytes
) -> None:
    broken = bytearray(header)
    broken[at % len(header)] = byte
    with contextlib.suppress(ValueError):
        found = parse(broken + more)
        if found is not None:
            info, size = found
            assert size <= len(broken) + len(more)
            assert (info.tls, info.authority, info.alpn) is not None


ports = st.integers(0, 65_535)
v4_endpoints = st.tuples(st.ip_addresses(v=4).map(str), ports)
v6_endpoints = st.tuples(
    st.ip_addresses(v=6).map(lambda each: socket.inet_ntop(socket.AF_INET6, each.packed)),
    ports,
    st.just(0),
    st.just(0),
)
endpoints = st.one_of(st.tuples(v4_endpoints, v4_endpoints), st.tuples(v6_endpoints, v6_endpoints))
some_tlvs = st.lists(
    st.tuples(st.integers(0, 255).filter(lambda each: each not in (3, 0x20)), st.binary()),
    max_size=5,
)


@given(endpoints, some_tlvs, st.booleans(), st.binary(max_size=20))
def test_what_is_written_is_read(
    ends: tuple[tuple[Any, ...], tuple[Any, ...]],
    tlvs: list[tuple[int, bytes]],
    has_crc: bool,
    more: bytes,
) -> None:
    line = v1(*ends)
    assert parse(line + more) == (PsProxyInfo(1, False, *ends), len(line))
    write = with_crc if has_crc else v2
    header = write(*ends, tlvs=[tlv(*each) for each in tlvs])
    found = parse(header + more)
    assert found is not None
    info, size = found
    assert size == len(header)
    assert (info.source, info.destination) == ends
    assert [each for each in info.tlvs if each[0] != 3] == tlvs


# A server behind a balancer


def records(caplog: pytest.LogCaptureFixture, least: int = logging.WARNING) -> list[str]:
    found = [each for each in caplog.records if each.levelno >= least]
    assert not any(each.exc_info for each in found)
    return [each.getMessage() for each in found]


class Remember(RecordingCallback):
    """An echo that knows who its peers are when they come."""

    def __init__(self) -> None:
        super().__init__(lambda message: message)
        self.opened: list[PsSession] = []
        self.seen: list[Any] = []

    def on_open(self, session: PsSession) -> None:
        self.opened.append(session)
        self.seen.append(session.remote_endpoint)
        super().on_open(session)


@pytest.mark.parametrize("header", [v1(), v2(), with_crc(tlvs=[tlv(5, b"id")])], ids=len)
@pytest.mark.parametrize("pause", [False, True], ids=["at once", "alone"])
def test_the_client_is_known_from_on_open_on_and_no_byte_of_it_is_lost(
    ps_server: ServerFactory, header: bytes, pause: bool
) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    with ScriptedClient(server.address) as balancer:
        balancer.send(header if pause else header + b"\0first\r\n")
        if pause:
            callback.wait_for("on_open")
            balancer.send(b"\0first\r\n")
        balancer.expect(b"\0first\r\n")
        (session,) = callback.opened
        assert callback.seen == [CLIENT]
        assert session.remote_endpoint == CLIENT
        assert session.local_endpoint == server.address
        assert session.proxy is not None
        assert session.proxy.source == CLIENT
        assert session.proxy.destination == SERVER
        assert session.proxy.proxy_endpoint == balancer.local_endpoint
        assert session.bytes_received == 8
        assert "203.0.113.7:50123" in repr(session)
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.PEER_CLOSE]
    assert callback.received() == b"\0first\r\n"
    assert session.proxy.source == CLIENT  # also after the close


@pytest.mark.parametrize("header", [v1(), v2(tlvs=[tlv(4, b"pad")]), UNKNOWN], ids=len)
def test_a_header_may_come_byte_by_byte(ps_server: ServerFactory, header: bytes) -> None:
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    with ScriptedClient(server.address) as balancer:
        balancer.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in header + b"x":
            balancer.send(bytes([byte]))
            gevent.sleep(0)
        balancer.expect(b"x")
    assert len(callback.seen) == 1


def test_the_largest_header_is_taken_and_the_first_message_after_it(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(echo(), proxy_protocol=True)
    with ScriptedClient(server.address) as balancer:
        balancer.send(GOOD_HEADERS["v2 largest"] + b"first")
        balancer.expect(b"first")
        assert server.sessions[0].proxy is not None
        assert len(server.sessions[0].proxy.tlvs[0][1]) == 65_520


@pytest.mark.parametrize("header", [UNKNOWN, LOCAL, v2(None, family=0), AWS_HEALTH_CHECK], ids=len)
def test_the_balancer_s_own_connection_keeps_its_own_endpoint(
    ps_server: ServerFactory, header: bytes
) -> None:
    server = ps_server(echo(), proxy_protocol=True)
    with ScriptedClient(server.address) as balancer:
        balancer.send(header + b"x")
        balancer.expect(b"x")
        (session,) = server.sessions
        assert session.remote_endpoint == balancer.local_endpoint
        assert session.proxy is not None
        assert session.proxy.is_local
        assert session.proxy.proxy_endpoint == balancer.local_endpoint


def test_a_server_without_the_setting_takes_the_header_for_a_message(
    ps_server: ServerFactory,
) -> None:
    server = ps_server(echo())
    with ScriptedClient(server.address) as balancer:
        balancer.send(v1())
        balancer.expect(v1())
        assert server.sessions[0].proxy is None
        assert server.sessions[0].remote_endpoint == balancer.local_endpoint


def test_a_server_that_speaks_first_waits_for_the_header(ps_server: ServerFactory) -> None:
    server = ps_server(PsHandler(lambda session: session.send("220 hello")), proxy_protocol=True)
    with ScriptedClient(server.address) as balancer:
        balancer.send(v1()[:-1])
        balancer.expect_nothing()
        assert server.sessions == []
        balancer.send(v1()[-1:])
        balancer.expect(b"220 hello")


def test_framing_begins_after_the_header(ps_server: ServerFactory) -> None:
    callback = RecordingCallback(lambda message: message)
    server = ps_server(callback, proxy_protocol=True, framing=Line())
    with ScriptedClient(server.address) as balancer:
        balancer.send(v1() + b"one\ntwo\nth")
        balancer.expect(b"one\ntwo\n")
        balancer.send(b"ree\n")
        balancer.expect(b"three\n")


@pytest.mark.parametrize(
    "data",
    [b"GET / HTTP/1.0\r\n\r\n", b"PROXY TCP4 1.2.3.4 1.2.3.4 65536 1\r\n", v2(family=0x41)],
    ids=["none", "v1", "v2"],
)
def test_a_bad_header_fails_with_one_warning(
    data: bytes, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True)
    with ScriptedClient(server.address) as client:
        client.send(data + bytes(100_000))
        (closed,) = callback.wait_for("on_close")
        with contextlib.suppress(ConnectionResetError):
            assert client.socket.recv(1) == b""
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, ValueError)
    assert closed.session.remote_endpoint == client.local_endpoint
    assert closed.session.proxy is None
    assert not callback.named("on_open")
    (message,) = records(caplog)
    assert "bad PROXY header" in message


@pytest.mark.parametrize("end", ["FIN", "RST"])
@pytest.mark.parametrize("start", [v1()[:20], v2()[:5], v2()[:20]], ids=len)
def test_a_header_that_is_cut_off_fails_with_one_warning(
    start: bytes, end: str, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True)
    with ScriptedClient(server.address) as client:
        client.send(start)
        eventually(lambda: server.get_session_count() == 1)
        client.eof() if end == "FIN" else client.reset()
        callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert not callback.named("on_open")
    assert len(records(caplog)) == 1


@pytest.mark.parametrize("start", [b"", v1()[:20], v2()[:20]], ids=len)
def test_a_header_must_be_whole_in_time(
    start: bytes, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True, handshake_timeout=0.3)
    with ScriptedClient(server.address) as client:
        client.send(start)
        with takes(0.3, most=0.6):
            client.expect_eof()
    (closed,) = callback.wait_for("on_close")
    assert closed.value is PsCloseReason.FAILED
    assert closed.session is not None
    assert isinstance(closed.session.close_cause, TimeoutError)
    (message,) = records(caplog)
    assert "not complete in time" in message


def test_a_trickle_does_not_extend_the_time(
    ps_server: ServerFactory,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True, handshake_timeout=0.3)
    with ScriptedClient(server.address) as client, takes(0.3, most=0.6):
        header = iter(GOOD_HEADERS["v2 largest"])
        while not callback.named("on_close"):
            with contextlib.suppress(ConnectionError):
                client.send(bytes([next(header)]))
            gevent.sleep(0.01)
    assert close_reasons(callback) == [PsCloseReason.FAILED]


@pytest.mark.parametrize("end", ["FIN", "RST", "RST at once"])
def test_who_only_looks_whether_somebody_is_there_is_no_failure(
    end: str, ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "psofa_gevent")
    callback = Remember()
    server = ps_server(callback, proxy_protocol=True)
    with ScriptedClient(server.address) as client:
        if end != "RST at once":
            eventually(lambda: server.get_session_count() == 1)
        client.eof() if end == "FIN" else client.reset()
        if end == "FIN":
            client.expect_eof()
    with ScriptedClient(server.address) as balancer:
        balancer.send(v1() + b"x")
        balancer.expect(b"x")
    callback.wait_for("on_close")
    eventually(lambda: not server.get_session_count())
    assert len(callback.named("on_open")) == len(callback.named("on_close")) == 1
    assert not records(caplog)
    assert records(caplog, logging.DEBUG)


def test_waiting_for_the_rest_of_a_header_costs_no_cpu(ps_server: ServerFactory) -> None:
    """What was seen of it is taken: else the socket would stay readable, and the hub busy."""
    rounds = 0

    def count() -> None:
        nonlocal rounds
        rounds += 1

    server = ps_server(PsCallback(), proxy_protocol=True)
    with ScriptedClient(server.address) as first, ScriptedClient(server.address) as second:
        first.send(v1()[:30])
        second.send(GOOD_HEADERS["v2 TLVs"][:4_000])
        eventually(lambda: server.get_session_count() == 2)
        gevent.sleep(0.05)
        check = gevent.get_hub().loop.check()
        check.start(count)
        gevent.sleep(0.3)
        check.stop()
        check.close()
    assert rounds < 50


def test_a_shutdown_ends_the_wait_and_no_callback_hears_of_it(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True, handshake_timeout=None)
    with ScriptedClient(server.address), ScriptedClient(server.address) as other:
        other.send(v2()[:17])
        eventually(lambda: server.get_session_count() == 2)
        with takes(most=0.5):
            server.shutdown()
    assert [event.name for event in callback.events] == ["on_start", "on_stop"]


@pytest.mark.logs_errors
@pytest.mark.parametrize("start", [b"", v1()[:20]], ids=len)
def test_a_wait_for_a_header_that_a_stranger_kills_fails_and_leaves_nothing(
    ps_server: ServerFactory, start: bytes
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True, max_sessions_per_peer=1)
    with ScriptedClient(server.address) as balancer:
        balancer.send(start)
        eventually(lambda: server.get_session_count() == 1)
        gevent.sleep(0.01)
        assert server._manager is not None
        (session,) = server._manager.sessions
        assert session.greenlet is not None
        session.greenlet.kill(block=False)
        balancer.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]
    assert not callback.named("on_open")


def test_silent_connections_hold_up_nobody(ps_server: ServerFactory) -> None:
    server = ps_server(echo(), proxy_protocol=True)
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(ScriptedClient(server.address))
        with ScriptedClient(server.address) as balancer:
            balancer.send(v1() + b"x")
            balancer.expect(b"x")
            assert len(server.sessions) == 1


# Whom it believes


def test_who_is_not_trusted_is_closed_and_not_believed(
    ps_server: ServerFactory, caplog: pytest.LogCaptureFixture
) -> None:
    def refusals() -> list[str]:
        return [each for each in records(caplog, logging.DEBUG) if "refused" in each]

    caplog.set_level(logging.DEBUG, "psofa_gevent")
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True, trusted_proxies=["192.0.2.0/24"])
    for refused in (1, 2):
        with ScriptedClient(server.address) as client:
            with contextlib.suppress(ConnectionError):
                client.send(v1())
            with contextlib.suppress(ConnectionResetError):
                assert client.socket.recv(100) == b""
        eventually(lambda: len(refusals()) == refused)  # noqa: B023 - called at once
        assert server.refused[PsRefusal.PROXY] == refused
        assert "203.0.113.7" not in refusals()[-1]
        assert "trusted_proxies" in refusals()[-1]
    assert len(records(caplog)) == 1  # once a minute
    assert [event.name for event in callback.events] == ["on_start"]
    assert server.get_session_count() == 0


@pytest.mark.parametrize(
    "trusted", [["127.0.0.1"], ["127.0.0.0/8"], ["::ffff:127.0.0.0/104"], {"0.0.0.0/0"}], ids=str
)
@needs_ipv6
def test_a_trusted_address_may_come_over_either_protocol(
    ps_server: ServerFactory, trusted: Any
) -> None:
    server = ps_server(
        echo(),
        host="::",
        socket_address_family=PsSocketAddressFamily.IPV6,
        proxy_protocol=True,
        trusted_proxies=trusted,
    )
    with ScriptedClient(("127.0.0.1", server.address[1])) as balancer:
        balancer.send(v1() + b"x")
        balancer.expect(b"x")
    with ScriptedClient(("::1", server.address[1])) as stranger:
        stranger.socket.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.socket.recv(1) == b""
    assert server.refused[PsRefusal.PROXY] == 1


def test_peers_on_unix_sockets_are_trusted(ps_server: ServerFactory, tmp_path: Path) -> None:
    callback = Remember()
    path = str(tmp_path / "s")
    ps_server(callback, host=f"unix:{path}", proxy_protocol=True, trusted_proxies=())
    with gevent.socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)
        with ScriptedClient.from_socket(sock) as balancer:
            balancer.send(v2(tlvs=[tlv(2, b"example.org")]) + b"x")
            balancer.expect(b"x")
    assert callback.seen == [CLIENT]
    proxy = callback.opened[0].proxy
    assert proxy is not None
    assert proxy.proxy_endpoint is None
    assert proxy.authority == "example.org"


# TLS after it


@pytest.fixture
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The contexts of a server and of a client that trusts it."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    for_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(for_server)
    for_client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(for_client)
    return for_server, for_client


def client_hello(context: ssl.SSLContext) -> tuple[bytes, Any]:
    """The first bytes of a handshake, and a function that ends it on a socket."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    hello = outgoing.read()

    def talk(peer: ScriptedClient, message: bytes) -> bytes:
        wanted: Any = tls.do_handshake
        received = b""
        while not received:
            try:
                received = wanted() or b""
                if wanted == tls.do_handshake:
                    tls.write(message)
                wanted = tls.read
            except ssl.SSLWantReadError:
                if outgoing.pending:
                    peer.send(outgoing.read())
                incoming.write(peer.socket.recv(65536))
        return received

    return hello, talk


@pytest.mark.parametrize("header", [v1(), v2(), LOCAL], ids=len)
def test_tls_begins_with_the_byte_after_the_header(
    header: bytes, ps_server: ServerFactory, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    server = ps_server(echo(), proxy_protocol=True, ssl_context=tls[0])
    for together in (True, False):
        with ScriptedClient(server.address) as balancer:
            hello, talk = client_hello(tls[1])
            if together:
                balancer.send(header + hello)
            else:
                balancer.send(header)
                eventually(lambda: server.get_session_count() == 1)
                gevent.sleep(0.01)
                balancer.send(hello)
            assert talk(balancer, b"secret") == b"secret"
            (session,) = server.sessions
            assert session.tls is not None
            assert session.proxy is not None
        eventually(lambda: not server.get_session_count())


def test_header_and_handshake_have_one_time_limit(
    ps_server: ServerFactory, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True, ssl_context=tls[0], handshake_timeout=0.6)
    with ScriptedClient(server.address) as balancer, takes(0.6, most=0.8):
        gevent.sleep(0.4)
        balancer.send(v1() + b"\x16")
        balancer.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.FAILED]


def test_a_balancer_that_looks_with_a_header_only_is_no_failure_of_tls(
    ps_server: ServerFactory,
    tls: tuple[ssl.SSLContext, ssl.SSLContext],
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = RecordingCallback()
    server = ps_server(callback, proxy_protocol=True, ssl_context=tls[0])
    for header in (LOCAL, v1()):
        with ScriptedClient(server.address) as balancer:
            balancer.send(header)
            balancer.eof()
            balancer.expect_eof()
    eventually(lambda: not server.get_session_count())
    assert [event.name for event in callback.events] == ["on_start"]
    assert not records(caplog)


def test_a_header_is_no_part_of_the_idle_time(ps_server: ServerFactory) -> None:
    callback = RecordingCallback()
    server: PsServer = ps_server(callback, proxy_protocol=True, idle_milliseconds=1)
    with ScriptedClient(server.address) as balancer:
        eventually(lambda: server.get_session_count() == 1)
        assert server._manager is not None
        (session,) = server._manager.sessions
        assert session._slice is not None
        gevent.sleep(0.01)
        session._slice.look()  # as the idle timer does, once a second
        gevent.sleep(0.01)
        assert server.get_session_count() == 1
        balancer.send(LOCAL)
        callback.wait_for("on_open")
        gevent.sleep(0.01)
        session._slice.look()
        balancer.expect_eof()
    callback.wait_for("on_close")
    assert close_reasons(callback) == [PsCloseReason.TIMEOUT]


def test_the_info_can_not_be_changed_and_compares() -> None:
    info = header_of(v2())
    with pytest.raises(AttributeError):
        info.version = 1  # type: ignore[misc]
    assert info == header_of(v2())
    assert hash(info) == hash(header_of(v2()))
