"""Framings, sans-I/O: bytes in, messages out; a message in, bytes out."""

from __future__ import annotations

import importlib
import inspect
import io
import itertools
import json
import textwrap
import time
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from psofa_gevent.framing import (
    SKIP,
    Between,
    Decoded,
    Delimiter,
    FixedSize,
    Framing,
    LengthPrefix,
    Line,
    Need,
    PsFramingError,
    Raw,
    Varint,
)

pytestmark = pytest.mark.no_gevent


def example_of(kind: type[Any], name: str) -> Any:
    """What `name` is in the code that a docstring shows."""
    lines = (inspect.getdoc(kind) or "").partition("::\n\n")[2].splitlines()
    code = itertools.takewhile(lambda line: not line or line.startswith("    "), lines)
    names: dict[str, Any] = {"Framing": Framing, "Need": Need, "PsFramingError": PsFramingError}
    exec(textwrap.dedent("\n".join(code)), names)
    return names[name]


Netstring = example_of(Framing, "Netstring")


class Own(Framing[bytes]):
    """A length of four bytes, and a ``decode`` that knows of nothing but messages."""

    def __init__(self, max_size: int = 2**31) -> None:
        self.max_size = max_size

    def decode(self, data: bytes, start: int) -> tuple[bytes, int] | None:
        assert type(data) is bytes
        if len(data) - start < 4:
            return None
        end = start + 4 + int.from_bytes(data[start : start + 4], "big")
        return (data[start + 4 : end], end) if len(data) >= end else None

    def encode(self, message: bytes) -> bytes:
        return len(message).to_bytes(4, "big") + message


class Packets(Framing[bytes]):
    """A byte that tells of a message, its length, and zeros between messages."""

    max_size = 2_000_000

    def __init__(self) -> None:
        self.asked = 0

    def decode(self, data: bytes, start: int) -> Decoded[bytes]:
        self.asked += 1
        end = start
        while end < len(data) and data[end] == 0:
            end += 1
        if end > start:
            return SKIP, end
        if data[start] != 0x7E:
            raise PsFramingError("no packet")
        if len(data) - start < 4:
            return Need(4)
        size = 4 + int.from_bytes(data[start + 1 : start + 4], "big")
        if len(data) - start < size:
            return Need(size)
        return data[start + 4 : start + size], start + size

    def encode(self, message: bytes) -> bytes:
        return b"\x7e" + len(message).to_bytes(3, "big") + message


FRAMINGS: dict[str, Framing[bytes]] = {
    "line": Line(),
    "line-crlf": Line(newline=b"\r\n"),
    "delimiter": Delimiter(b"\0"),
    "delimiter-2": Delimiter(b"\r\n"),
    "delimiter-3": Delimiter(b"aab"),
    "delimiter-ignoring": Delimiter(b"\0", ignore=b"\r\n"),
    "delimiter-ignoring-itself": Delimiter(b"\r\n", ignore=b"\r"),
    "stx-etx": Between(b"\x02", b"\x03"),
    "mllp": Between(b"\x0b", b"\x1c\r"),
    "between-long": Between(b"<<<", b">>>"),
    "between-resync": Between(b"\x02", b"\x03", resynchronise=True),
    "between-resync-long": Between(b"<a<", b">>", resynchronise=True),
    "flags": Between(b"~", b"~"),
    "flags-resync": Between(b"~", b"~", resynchronise=True),
    "flags-long": Between(b"aab", b"aab"),
    "flags-long-resync": Between(b"||", b"||", resynchronise=True),
    **{f"length-{size}": LengthPrefix(size) for size in range(1, 9)},
    **{f"length-le-{size}": LengthPrefix(size, byteorder="little") for size in range(1, 9)},
    "length-itself": LengthPrefix(2, includes_prefix=True),
    "length-adjusted": LengthPrefix(2, adjustment=-4),
    "length-offset": LengthPrefix(2, offset=3),
    "length-offset-itself": LengthPrefix(3, offset=2, includes_prefix=True),
    "varint": Varint(),
    "fixed": FixedSize(7),
    "netstring": Netstring(),
    "own": Own(),
    "packets": Packets(),
}

each_framing = pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS.keys())
# Of bytes that mean something to one or the other framing, so that they come often.
contents = st.one_of(
    st.binary(max_size=40), st.text("\r\n\0\x02\x03\x0b\x1c<>ab:,5~|", max_size=20).map(str.encode)
)


def decode(framing: Framing[Any], chunks: Iterable[bytes]) -> list[Any]:
    decoder = framing.decoder()
    return [message for chunk in chunks for message in decoder.feed(chunk)]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """`data` in pieces, none of them empty."""
    borders = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in itertools.pairwise(borders)]


def encodable(framing: Framing[bytes], messages: Iterable[bytes]) -> list[bytes]:
    """Those that the framing can carry."""
    good = []
    if isinstance(framing, FixedSize):
        messages = [each[: framing.size].ljust(framing.size, b"-") for each in messages]
    for message in messages:
        try:
            framing.encode(message)
        except PsFramingError:
            continue
        good.append(message)
    return good


# What holds for all of them


@each_framing
@given(st.lists(contents, max_size=8), st.lists(st.integers(0, 400), max_size=12))
def test_messages_come_whole_and_in_order_however_the_stream_is_cut(
    framing: Framing[bytes], messages: list[bytes], places: list[int]
) -> None:
    messages = encodable(framing, messages)
    stream = b"".join(map(framing.encode, messages))
    assert decode(framing, cut(stream, places)) == messages


@each_framing
@given(st.lists(contents, max_size=5))
def test_messages_come_whole_byte_by_byte(framing: Framing[bytes], messages: list[bytes]) -> None:
    messages = encodable(framing, messages)
    stream = b"".join(map(framing.encode, messages))
    decoder = framing.decoder()
    got = [message for byte in stream for message in decoder.feed(bytes([byte]))]
    assert got == messages
    assert decoder.kept == 0


@each_framing
@given(
    st.lists(contents, min_size=1, max_size=6),
    st.lists(st.integers(0, 400), max_size=6),
    st.integers(0, 5),
    st.binary(max_size=9),
)
def test_what_was_not_given_out_is_unread(
    framing: Framing[bytes], messages: list[bytes], places: list[int], taken: int, rest: bytes
) -> None:
    messages = encodable(framing, messages)
    taken = min(taken, len(messages))
    head = b"".join(map(framing.encode, messages[:taken]))
    stream = head + b"".join(map(framing.encode, messages[taken:]))
    decoder = framing.decoder()
    got = 0
    read = b""
    for chunk in cut(stream, places) if taken else []:
        read += chunk
        for message in decoder.feed(chunk):
            assert message == messages[got]
            got += 1
            if got == taken:
                break
        if got == taken:
            break
    assert head + decoder.unread() == (read if taken else b"")


@each_framing
@given(st.lists(contents, min_size=1, max_size=3), st.integers(1, 30))
def test_an_unfinished_message_is_kept_and_counted(
    framing: Framing[bytes], messages: list[bytes], missing: int
) -> None:
    messages = encodable(framing, messages)
    if not messages:
        return
    last = framing.encode(messages[-1])
    missing = min(missing, len(last))
    stream = b"".join(map(framing.encode, messages))
    decoder = framing.decoder()
    assert list(decoder.feed(stream[: len(stream) - missing])) == messages[:-1]
    assert decoder.kept == len(last) - missing
    assert decoder.unread() == last[: len(last) - missing]


@each_framing
@given(st.lists(st.binary(max_size=60), max_size=10))
def test_any_bytes_are_messages_or_an_error(framing: Framing[bytes], chunks: list[bytes]) -> None:
    try:
        messages = decode(framing, chunks)
    except PsFramingError:
        return
    assert sum(map(len, messages)) <= sum(map(len, chunks))


# max_size

LIMITED: dict[str, Framing[bytes]] = {
    "line": Line(max_size=100),
    "line-crlf": Line(newline=b"\r\n", max_size=100),
    "delimiter": Delimiter(b"\r\n", max_size=100),
    "between": Between(b"((", b"))", max_size=100),
    "between-resync": Between(b"((", b"))", resynchronise=True, max_size=100),
    "flags": Between(b"~", b"~", max_size=100),
    "flags-resync": Between(b"||", b"||", resynchronise=True, max_size=100),
    "ignoring": Delimiter(b"\r\n", ignore=b"\n", max_size=100),
    "length": LengthPrefix(4, max_size=100),
    "length-3": LengthPrefix(3, byteorder="little", max_size=100),
    "length-itself": LengthPrefix(2, offset=1, includes_prefix=True, max_size=100),
    "varint": Varint(max_size=100),
}
each_limited = pytest.mark.parametrize("framing", LIMITED.values(), ids=LIMITED.keys())


def without_limit(framing: Any) -> Any:
    settings = {name: value for name, value in vars(framing).items() if not name.startswith("_")}
    settings["max_size"] = 10_000
    if isinstance(framing, Line):
        del settings["delimiter"]
    return type(framing)(**settings)


@each_limited
@pytest.mark.parametrize("step", [1, 7, 64, 1_000])
def test_a_message_of_max_size_passes_and_one_byte_more_is_an_error(
    framing: Framing[bytes], step: int
) -> None:
    large = without_limit(framing)
    fits, too_large = large.encode(b"x" * 100), large.encode(b"x" * 101)
    pieces = [fits[at : at + step] for at in range(0, len(fits), step)]
    assert decode(framing, pieces) == [b"x" * 100]
    pieces = [too_large[at : at + step] for at in range(0, len(too_large), step)]
    with pytest.raises(PsFramingError, match="bytes"):
        decode(framing, pieces)


@each_limited
def test_messages_before_one_that_is_too_large_are_given_out(framing: Framing[bytes]) -> None:
    stream = framing.encode(b"1") + framing.encode(b"2") + without_limit(framing).encode(bytes(101))
    messages = framing.decoder().feed(stream)
    assert [next(messages), next(messages)] == [b"1", b"2"]
    with pytest.raises(PsFramingError):
        next(messages)


@each_limited
def test_a_message_that_is_too_large_is_not_encoded(framing: Framing[bytes]) -> None:
    framing.encode(b"x" * 100)
    with pytest.raises(PsFramingError, match="larger than max_size"):
        framing.encode(b"x" * 101)


@pytest.mark.parametrize(
    "framing",
    [
        Line(max_size=1_000_000),
        Delimiter(b"\r\n", max_size=1_000_000),
        Between(b"((", b"))", max_size=1_000_000),
        Between(b"((", b"))", resynchronise=True, max_size=1_000_000),
        Between(b"~", b"~", max_size=1_000_000),
        Delimiter(b"\0", ignore=b"\r\n", max_size=1_000_000),
        Own(),
        Packets(),
        LengthPrefix(max_size=1_000_000),
        LengthPrefix(offset=900_000, max_size=1_000_000),
        Varint(max_size=1_000_000),
        FixedSize(1_000_000),
    ],
    ids=lambda framing: type(framing).__name__,
)
def test_a_large_message_costs_its_size_and_its_bytes_are_looked_at_once(
    framing: Framing[bytes],
) -> None:
    # Looked at again with each of 20,000 pieces it would take minutes.
    stream = framing.encode(b"x" * 1_000_000)
    pieces = [stream[at : at + 50] for at in range(0, len(stream), 50)]
    decoder = framing.decoder()
    tracemalloc.start()
    try:
        (message,) = [message for piece in pieces for message in decoder.feed(piece)]
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(message) == 1_000_000
    # The message, what was kept of it, and what a growing buffer takes in advance.
    assert peak < 2.5 * 1_000_000


# One by one


@pytest.mark.parametrize(
    ("framing", "message", "stream"),
    [
        (Line(), b"hello", b"hello\n"),
        (Line(newline=b"\r\n"), b"hello", b"hello\r\n"),
        (Delimiter(b"||"), b"hello|", None),
        (Delimiter(b"||"), b"hello", b"hello||"),
        (Between(b"\x0b", b"\x1c\r"), b"MSH|", b"\x0bMSH|\x1c\r"),
        (LengthPrefix(), b"hello", b"\0\0\0\5hello"),
        (LengthPrefix(2, byteorder="little"), b"hello", b"\5\0hello"),
        (LengthPrefix(2, adjustment=-4), b"hello", b"\0\x09hello"),
        (LengthPrefix(4, includes_prefix=True), b"hello", b"\0\0\0\x09hello"),
        (LengthPrefix(2, offset=2), b"\xca\xfehello", b"\xca\xfe\0\5hello"),
        (LengthPrefix(2, offset=1, adjustment=1), b"\xca\xfehello", b"\xca\0\5\xfehello"),
        (LengthPrefix(1), bytes(255), b"\xff" + bytes(255)),
        (LengthPrefix(1), bytes(256), None),
        (LengthPrefix(2, offset=3), b"ab", None),
        (Varint(), bytes(300), b"\xac\x02" + bytes(300)),
        (Varint(), b"", b"\0"),
        (FixedSize(3), b"abc", b"abc"),
        (FixedSize(3), b"ab", None),
        (Line(), b"two\nlines", None),
        (Line(), b"ends with CR\r", None),
        (Between(b"\x02", b"\x03"), b"a\x03", None),
        (Between(b"\x02", b"\x03"), b"a\x02", b"\x02a\x02\x03"),
        (Between(b"\x02", b"\x03", resynchronise=True), b"a\x02", None),
        (Between(b"~", b"~"), b"abc", b"~abc~"),
        (Between(b"~", b"~"), b"a~c", None),
        (Between(b"~", b"~", resynchronise=True), b"", None),
        (Between(b"||", b"||"), b"|b", b"|||b||"),
        (Between(b"||", b"||"), b"b|", None),
        (Delimiter(b"\0", ignore=b"\r\n"), b"SEND\n", b"SEND\n\0"),
        (Delimiter(b"\0", ignore=b"\r\n"), b"\nSEND", None),
        (Delimiter(b"\n", ignore=b"\n"), b"", None),
    ],
)
def test_what_stands_in_the_stream(
    framing: Framing[bytes], message: bytes, stream: bytes | None
) -> None:
    if stream is None:
        with pytest.raises(PsFramingError) as raised:
            framing.encode(message)
        assert repr(framing) in str(raised.value)
    else:
        assert framing.encode(message) == stream
        assert decode(framing, [stream]) == [message]


@pytest.mark.parametrize("framing", [Line(), Varint(), LengthPrefix(), Delimiter(b"\0"), Raw()])
def test_everything_that_is_bytes_can_be_sent(framing: Any) -> None:
    assert framing.encode("grün") == framing.encode("grün".encode())
    assert framing.encode(bytearray(b"ab")) == framing.encode(memoryview(b"ab"))
    with pytest.raises(TypeError, match="not int"):
        framing.encode(5)


def test_lines_end_with_lf_or_cr_lf() -> None:
    assert decode(Line(), [b"a\r\nb\n\n\r\nc\rd\n"]) == [b"a", b"b", b"", b"", b"c\rd"]


def test_noise_between_messages_is_an_error_or_skipped() -> None:
    stream = b"noise\x02one\x03more noise\x02tw\x02three\x03\x03\x02four\x03"
    with pytest.raises(PsFramingError, match="starts with b'n'"):
        decode(Between(b"\x02", b"\x03"), [stream])
    framing = Between(b"\x02", b"\x03", resynchronise=True)
    for step in range(1, 8):
        pieces = [stream[at : at + step] for at in range(0, len(stream), step)]
        assert decode(framing, pieces) == [b"one", b"three", b"four"]


@pytest.mark.parametrize(
    ("start", "end", "messages"),
    [
        (b"$", b"$\n", [b"one", b"two"]),
        (b"\n", b"\r\n\0", [b"one", b"two"]),
        (b"ab", b"bc", [b"xa", b"ya"]),  # begins again where the message and its end meet
    ],
)
def test_what_looks_like_a_start_in_an_end_is_none_however_the_stream_is_cut(
    start: bytes, end: bytes, messages: list[bytes]
) -> None:
    framing = Between(start, end, resynchronise=True)
    stream = b"".join(map(framing.encode, messages))
    for size in range(1, len(stream) + 1):
        chunks = cut(stream, range(size, len(stream), size))
        assert decode(framing, chunks) == messages


def test_a_message_that_is_given_up_does_not_count_for_the_size_of_the_next() -> None:
    framing = Between(b"(", b")", resynchronise=True, max_size=10)
    for step in (1, 5, 100):
        stream = b"(given up,(given up,(whole)"
        pieces = [stream[at : at + step] for at in range(0, len(stream), step)]
        assert decode(framing, pieces) == [b"whole"]


def test_endless_noise_is_skipped_and_not_kept() -> None:
    decoder = Between(b"<<<", b">>>", resynchronise=True).decoder()
    for _ in range(1_000):
        assert list(decoder.feed(b"noise <<" * 10)) == []
        assert decoder.kept <= 2
    assert list(decoder.feed(b"<message>>>")) == [b"message"]


@pytest.mark.parametrize(
    ("framing", "stream", "why"),
    [
        (LengthPrefix(4), b"\xff\xff\xff\xff", "says 4294967295 bytes"),
        (LengthPrefix(2, includes_prefix=True), b"\0\1", "says -1 bytes"),
        (Varint(), b"\xff\xff\xff\xff\xff\xff", "more than 5 bytes"),
        (Varint(), b"\xff\xff\xff\x7f", "268435455 bytes"),
        (Netstring(), b"five:hello,", "not the length of a netstring: b'f"),
        (Netstring(), b":hello,", "not the length"),
        (Netstring(), b"-1:,", "not the length"),
        (Netstring(), b"+5:hello,", "not the length"),
        (Netstring(), b" 5:hello,", "not the length"),
        (Netstring(), b"5_0:hello,", "not the length"),
        (Netstring(), "\N{ARABIC-INDIC DIGIT FIVE}:hello,".encode(), "not the length"),
        (Netstring(), b"05:hello,", "begins with 0"),
        (Netstring(), b"00:,", "begins with 0"),
        (Netstring(), b"123456", "not the length"),
        (Netstring(), b"100000:", "not the length"),
        (Netstring(), b"99999:", "larger than max_size"),
        (Netstring(), b"5:helloX", "does not end with a comma"),
        (Netstring(), b"0:X", "does not end with a comma"),
        (Between(b"~", b"~"), b"noise~a~", "starts with b'n'"),
        (Between(b"~", b"~"), b"\n~a~", "starts with"),
    ],
)
def test_a_malformed_length_is_an_error(framing: Framing[bytes], stream: bytes, why: str) -> None:
    with pytest.raises(PsFramingError, match=why):
        decode(framing, [stream])
    with pytest.raises(PsFramingError, match=why):
        decode(framing, [stream[:1], stream[1:]])


def test_raw_ends_after_its_bytes() -> None:
    decoder = Raw(5).decoder()
    fed = [(list(decoder.feed(data)), decoder.spent) for data in (b"ab", b"cdefg")]
    assert fed == [([b"ab"], False), ([b"cde"], True)]
    assert decoder.unread() == b"fg"
    endless = Raw().decoder()
    assert [(list(endless.feed(b"ab")), endless.spent)] == [([b"ab"], False)]


# Types of messages, and framings of a user's own


def test_messages_of_other_types() -> None:
    framing = Line().typed(json.loads, json.dumps)
    stream = framing.encode({"a": 1}) + framing.encode([2])
    assert stream == b'{"a": 1}\n[2]\n'
    assert decode(framing, [stream[:5], stream[5:]]) == [{"a": 1}, [2]]
    with pytest.raises(PsFramingError, match="JSONDecodeError"):
        decode(framing, [b"{\n"])
    decoder = framing.decoder()
    assert next(decoder.feed(b"1\n2\n3")) == 1  # and no further
    assert decoder.unread() == b"2\n3"


def test_a_framing_that_loses_its_place_is_an_error() -> None:
    class Stuck(Framing[bytes]):
        def decode(self, data: bytes, start: int) -> tuple[bytes, int]:
            return data[start:], start

    with pytest.raises(PsFramingError, match="index 0"):
        decode(Stuck(), [b"abc"])


def test_a_message_that_never_ends_in_a_framing_of_ones_own_is_an_error() -> None:
    with pytest.raises(PsFramingError, match="a message of 104 bytes is larger than max_size"):
        decode(Own(max_size=100), [b"99999999"] * 300)


@pytest.mark.parametrize("end", [0, 4])
def test_a_framing_that_skips_to_nowhere_is_an_error(end: int) -> None:
    class Stuck(Framing[bytes]):
        def decode(self, data: bytes, start: int) -> Decoded[bytes]:
            return SKIP, end

    with pytest.raises(PsFramingError, match=f"Stuck.*index {end}"):
        decode(Stuck(), [b"abc"])


@pytest.mark.parametrize("answer", [SKIP, b"a message", (b"message",), 5, (b"message", "5")])
def test_an_answer_that_can_not_be_is_an_error_that_names_the_framing(answer: Any) -> None:
    class Mistaken(Framing[bytes]):
        def decode(self, data: bytes, start: int) -> Any:
            return answer

    with pytest.raises(PsFramingError, match=r"Mistaken.*decode returned"):
        decode(Mistaken(), [b"abc"])


def test_a_framing_that_lacks_a_half_says_which() -> None:
    class Half(Framing[bytes]):
        pass

    with pytest.raises(PsFramingError, match="Half has no decode"):
        decode(Half(), [b"abc"])
    with pytest.raises(NotImplementedError, match="Half has no encode"):
        Half().encode(b"abc")


def test_what_is_skipped_is_neither_kept_nor_a_message_that_has_begun() -> None:
    packets = Packets()
    decoder = packets.decoder()
    packet = packets.encode(b"message")
    for piece in [bytes(7), bytes(1)] * 1_000:
        assert list(decoder.feed(piece)) == []
        assert (decoder.kept, decoder.has_begun, decoder.unread()) == (0, False, b"")
    assert list(decoder.feed(bytes(5) + packet[:3])) == []
    assert (decoder.kept, decoder.has_begun, decoder.unread()) == (3, True, packet[:3])
    assert list(decoder.feed(packet[3:] + bytes(9) + packet + bytes(2))) == [b"message"] * 2
    assert (decoder.kept, decoder.has_begun, decoder.unread()) == (0, False, b"")


def test_a_framing_of_ones_own_is_not_asked_before_there_is_what_it_needs() -> None:
    packets = Packets()
    decoder = packets.decoder()
    packet = packets.encode(b"x" * 1_000)
    asked = []
    got = []
    for byte in packet + packet[:1]:
        got += list(decoder.feed(bytes([byte])))
        asked.append(packets.asked)
    # For the first byte, for the length, for the whole of it; and for the next one.
    assert (asked[0], asked[2], asked[3], asked[-3], asked[-2], asked[-1]) == (1, 1, 2, 2, 3, 4)
    assert got == [b"x" * 1_000]


class Needing(Framing[bytes]):
    """Asks for as much as the first byte says."""

    max_size = 100

    def decode(self, data: bytes, start: int) -> Decoded[bytes]:
        return Need(data[start])


@pytest.mark.parametrize("need", [1, 2, 3])
def test_to_need_what_is_there_is_an_error_that_names_the_framing(need: int) -> None:
    with pytest.raises(PsFramingError, match=rf"Needing.*Need\(n={need}\), but 3 bytes are there"):
        decode(Needing(), [bytes([need, 0, 0])])


def test_to_need_more_than_max_size_is_an_error_at_once() -> None:
    assert decode(Needing(), [b"\x64"]) == []
    with pytest.raises(PsFramingError, match="a message of 101 bytes is larger than max_size"):
        decode(Needing(), [b"\x65"])


@pytest.mark.parametrize(
    ("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_to_need_what_is_no_number_of_bytes_is_refused(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"Need\(n\)"):
        Need(n)


def test_what_decode_got_may_be_kept() -> None:
    seen: list[tuple[bytes, bytes]] = []

    class Keeping(Own):
        def decode(self, data: bytes, start: int) -> tuple[bytes, int] | None:
            seen.append((data, bytes(bytearray(data))))
            return super().decode(data, start)

    framing = Keeping()
    stream = framing.encode(b"one") + framing.encode(b"two" * 10)
    assert decode(framing, [stream[at : at + 3] for at in range(0, len(stream), 3)]) == [
        b"one",
        b"two" * 10,
    ]
    assert all(data == copy for data, copy in seen)
    assert len(seen) > 10


@pytest.mark.parametrize(
    ("framing", "size", "read"),
    [(Own(), 32 * 2**20, 4_096), (LengthPrefix(offset=2**21, max_size=2**22), 2**21 + 99, 10)],
    ids=["own", "offset"],
)
def test_what_is_kept_is_not_copied_for_each_piece(
    framing: Framing[bytes], size: int, read: int
) -> None:
    # Copied for each of them it takes 60 and 10 seconds of CPU time; so, 0.3 and 0.1.
    stream = framing.encode(bytes(size))
    began = time.process_time()
    (message,) = decode(framing, (stream[at : at + read] for at in range(0, len(stream), read)))
    assert time.process_time() - began < 3
    assert len(message) == size


# Bytes between messages


@given(
    st.lists(st.text("\r\n\0ab", max_size=8).map(str.encode), max_size=6),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from([b"\0", b"\n", b"\r\n", b"\0\0"]),
)
def test_ignored_bytes_in_front_of_a_message_are_dropped_however_the_stream_is_cut(
    parts: list[bytes], places: list[int], delimiter: bytes
) -> None:
    stream = delimiter.join(parts) + delimiter
    right = []
    left = stream.lstrip(b"\r\n")
    while delimiter in left:
        message, _, left = left.partition(delimiter)
        right.append(message)
        left = left.lstrip(b"\r\n")
    decoder = Delimiter(delimiter, ignore=b"\r\n").decoder()
    got = [message for piece in cut(stream, places) for message in decoder.feed(piece)]
    assert got == right
    assert decoder.unread() == left


def test_ignored_bytes_are_not_kept() -> None:
    decoder = Delimiter(b"\0", ignore=b"\r\n", max_size=5).decoder()
    for piece in [b"\n", b"\r\n" * 10] * 100:
        assert list(decoder.feed(piece)) == []
        assert (decoder.kept, decoder.has_begun, decoder.unread()) == (0, False, b"")
    assert list(decoder.feed(b"\nhello\0\n")) == [b"hello"]
    assert decoder.kept == 0
    assert list(decoder.feed(b"\nhel")) == []
    assert (decoder.kept, decoder.has_begun) == (3, True)


@pytest.mark.parametrize("ignore", [b"^", b"]", b"a-z", b"\\", b"[[", b"&&"])
def test_any_byte_can_be_ignored(ignore: bytes) -> None:
    assert decode(Delimiter(b"\0", ignore=ignore), [ignore * 3 + b"b^]\0"]) == [b"b^]"]


@pytest.mark.parametrize(
    "framing", [Delimiter(b"\0", max_size=5), Own(max_size=8)], ids=["delimiter", "own"]
)
def test_no_message_has_begun_with_line_ends_but_they_are_its_first_bytes(
    framing: Framing[bytes],
) -> None:
    decoder = framing.decoder()
    for _ in range(2):
        for begun in (b"\n", b"\n", b"\r"):
            assert list(decoder.feed(begun)) == []
            assert not decoder.has_begun
        assert list(decoder.feed(b"x")) == []
        assert decoder.has_begun
        assert decoder.unread() == b"\n\n\rx"
        list(decoder.feed(b"\n\0"))
        decoder = framing.decoder()


def test_line_ends_in_front_of_a_message_of_ones_own_framing_do_not_count_for_max_size() -> None:
    class Stomp(Framing[bytes]):
        max_size = 10

        def decode(self, data: bytes, start: int) -> tuple[bytes, int] | None:
            end = data.find(b"\0", start)
            return None if end < 0 else (data[start:end], end + 1)

    decoder = Stomp().decoder()
    for _ in range(100):
        assert list(decoder.feed(b"\n")) == []
    assert list(decoder.feed(b"0123456789")) == []
    assert list(decoder.feed(b"\0\n")) == [b"\n" * 100 + b"0123456789"]
    with pytest.raises(PsFramingError, match="a message of 11 bytes"):
        decode(Stomp(), [b"\n" * 100, b"01234567890"])
    with pytest.raises(PsFramingError, match="a message of 11 bytes"):  # they are kept, after all
        decode(Stomp(), [b"\n" * 50_000, b"\n" * 15_547])


# Flags


def between_flags(stream: bytes, flag: bytes) -> tuple[list[bytes], bytes]:
    """The messages, and what has come after the last flag."""
    noise, *parts = stream.split(flag)
    return [part for part in parts[:-1] if part], parts[-1] if parts else noise


@given(
    st.text("~|ab", max_size=60).map(str.encode),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from([b"~", b"||", b"ab", b"aba"]),
)
@example(b"est~~b~~c~~d~", [], b"~")
@example(b"~a~b~~c~~d~", [], b"~")
def test_messages_come_between_flags_that_may_be_shared_or_fill_the_time(
    stream: bytes, places: list[int], flag: bytes
) -> None:
    right, left = between_flags(stream, flag)
    decoder = Between(flag, flag, resynchronise=True).decoder()
    got = [message for piece in cut(stream, places) for message in decoder.feed(piece)]
    assert got == right
    if flag in stream:
        assert decoder.unread().removeprefix(flag) == left
    # The same without noise before the first flag, where that is an error.
    decoder = Between(flag, flag).decoder()
    stream = flag + stream
    right, left = between_flags(stream, flag)
    got = [message for piece in cut(stream, places) for message in decoder.feed(piece)]
    assert got == right
    assert decoder.unread().removeprefix(flag) == left


def test_flags_that_fill_the_time_are_no_message_that_has_begun() -> None:
    decoder = Between(b"~", b"~").decoder()
    for piece in (b"~", b"~~~", b"~a~", b"~", b"~~"):
        list(decoder.feed(piece))
        assert not decoder.has_begun
        assert decoder.kept <= 1
    list(decoder.feed(b"b"))
    assert (decoder.has_begun, decoder.kept, decoder.unread()) == (True, 2, b"~b")


def test_noise_before_the_first_flag_is_not_kept() -> None:
    decoder = Between(b"<>", b"<>", resynchronise=True, max_size=10).decoder()
    for _ in range(100):
        assert list(decoder.feed(b"much noise <")) == []
        assert decoder.kept == 1
    assert list(decoder.feed(b">a<>")) == [b"a"]


# Settings


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Line(newline=b"\r"), ValueError, "newline"),
        (lambda: Line(max_size=0), ValueError, "max_size must be from 1"),
        (lambda: Line(max_size="1"), TypeError, "max_size must be a whole number"),  # type: ignore[arg-type]
        (lambda: Delimiter(b""), ValueError, "delimiter"),
        (lambda: Delimiter("\n"), TypeError, "delimiter"),  # type: ignore[arg-type]
        (lambda: Delimiter(b"\0", ignore="\n"), TypeError, "ignore must be bytes"),  # type: ignore[arg-type]
        (lambda: Between(b"", b"x"), ValueError, "start"),
        (lambda: Between(b"x", b""), ValueError, "end"),
        (lambda: Between(b"x", b"y", resynchronise=1), TypeError, "resynchronise"),  # type: ignore[arg-type]
        (lambda: LengthPrefix(0), ValueError, "size must be from 1 to 8 bytes, not 0"),
        (lambda: LengthPrefix(9), ValueError, "size"),
        (lambda: LengthPrefix(byteorder="network"), ValueError, "byteorder"),  # type: ignore[arg-type]
        (lambda: LengthPrefix(offset=-1), ValueError, "offset"),
        (lambda: LengthPrefix(offset=5, max_size=4), ValueError, "offset"),
        (lambda: LengthPrefix(adjustment=1.5), TypeError, "adjustment"),  # type: ignore[arg-type]
        (lambda: LengthPrefix(includes_prefix=1), TypeError, "includes_prefix"),  # type: ignore[arg-type]
        (lambda: Varint(max_size=True), TypeError, "max_size"),
        (lambda: FixedSize(0), ValueError, "size"),
        (lambda: Raw(0), ValueError, "size"),
    ],
)
def test_impossible_settings_are_refused(
    make: Callable[[], object], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        make()


# What others wrote


def test_line_understands_twisteds_line_receiver_and_the_other_way_round() -> None:
    basic = pytest.importorskip("twisted.protocols.basic")
    lines = [b"one", b"", b"three" * 1_000]
    framing = Line(newline=b"\r\n")
    wire = through_twisted(basic.LineReceiver, "sendLine", lines)
    assert decode(framing, [wire]) == lines
    assert received_by_twisted(basic.LineReceiver, "lineReceived", framing, lines) == lines


@pytest.mark.parametrize(("receiver", "size"), [("Int8", 1), ("Int16", 2), ("Int32", 4)])
def test_length_prefix_understands_twisteds_receivers_and_the_other_way_round(
    receiver: str, size: int
) -> None:
    basic = pytest.importorskip("twisted.protocols.basic")
    kind = getattr(basic, f"{receiver}StringReceiver")
    strings = [b"one", b"", b"three" * 50]
    framing = LengthPrefix(size)
    wire = through_twisted(kind, "sendString", strings)
    assert wire == b"".join(map(framing.encode, strings))
    assert received_by_twisted(kind, "stringReceived", framing, strings) == strings


def through_twisted(kind: Any, send: str, messages: list[bytes]) -> bytes:
    testing: Any = importlib.import_module("twisted.internet.testing")
    transport = testing.StringTransport()
    protocol = kind()
    protocol.makeConnection(transport)
    for message in messages:
        getattr(protocol, send)(message)
    wire: bytes = transport.value()
    return wire


def received_by_twisted(
    kind: Any, method: str, framing: Framing[bytes], messages: list[bytes]
) -> list[bytes]:
    testing: Any = importlib.import_module("twisted.internet.testing")
    got: list[bytes] = []
    protocol = type("Recorder", (kind,), {method: lambda _self, message: got.append(message)})()
    protocol.makeConnection(testing.StringTransport())
    wire = b"".join(map(framing.encode, messages))
    for at in range(0, len(wire), 11):
        protocol.dataReceived(wire[at : at + 11])
    return got


def test_varint_understands_protobufs_delimited_messages_and_the_other_way_round() -> None:
    proto = pytest.importorskip("google.protobuf.proto")
    BytesValue = importlib.import_module("google.protobuf.wrappers_pb2").BytesValue  # noqa: N806
    values = [BytesValue(value=bytes([size % 256]) * size) for size in (0, 1, 127, 128, 20_000)]
    stream = io.BytesIO()
    for value in values:
        proto.serialize_length_prefixed(value, stream)
    framing = Varint().typed(BytesValue.FromString, BytesValue.SerializeToString)
    wire = stream.getvalue()
    assert decode(framing, [wire[at : at + 99] for at in range(0, len(wire), 99)]) == values
    assert b"".join(map(framing.encode, values)) == wire
