"""The type variable of messages, and the conversion of text and buffers to bytes.

The functions run in any greenlet and any OS thread, and do not switch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Only for type checkers, which have their own copy: Python knows no default before 3.13.
    from typing_extensions import TypeVar

    M = TypeVar("M", default=bytes)
    """The type of the messages: bytes, or whatever a framing makes of them."""
else:
    from typing import TypeVar

    M = TypeVar("M")

__all__ = ["M", "Message", "as_buffer", "as_bytes"]

Message = str | bytes | bytearray | memoryview


def as_buffer(message: object) -> bytes | memoryview:
    """Return `message` as bytes, copied only if necessary: text as UTF-8, a buffer byte by byte.

    Raises:
        TypeError: `message` is neither text nor such a buffer.
        UnicodeEncodeError: `message` is text with a lone surrogate, which UTF-8 cannot encode
            (RFC 3629, section 3). This error is a `ValueError`, and says where.
    """
    if isinstance(message, str):
        return message.encode()
    if isinstance(message, bytes):
        return message
    if isinstance(message, (bytearray, memoryview)):
        return memoryview(message).cast("B")
    raise TypeError(
        f"message must be str, bytes, bytearray or memoryview, not {type(message).__name__}"
    )


def as_bytes(message: object) -> bytes:
    """Return `message` as immutable bytes. Raises the errors of `as_buffer`."""
    return message if type(message) is bytes else bytes(as_buffer(message))
