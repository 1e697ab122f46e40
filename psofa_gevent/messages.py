"""What may be sent, and how it becomes bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # For type checkers, which bring it with them: a default is not known to Python before 3.13.
    from typing_extensions import TypeVar

    M = TypeVar("M", default=bytes)
    """The type of the messages: bytes, or whatever a framing makes of them."""
else:
    from typing import TypeVar

    M = TypeVar("M")

__all__ = ["M", "Message", "as_buffer", "as_bytes"]

Message = str | bytes | bytearray | memoryview


def as_buffer(message: object) -> bytes | memoryview:
    """`message` as bytes, copied only if it must be: text as UTF-8, any buffer byte by byte.

    Raises:
        TypeError: it is none of these.
        UnicodeEncodeError: it is text with a lone surrogate, which UTF-8 has no bytes for
            (RFC 3629, section 3). It is a `ValueError`, and says where.
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
    """`message` as bytes that nobody else can change. Errors as `as_buffer`."""
    return message if type(message) is bytes else bytes(as_buffer(message))
