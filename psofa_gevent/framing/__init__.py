"""Messages instead of chunks: TCP is a stream of bytes, and a framing cuts it into messages.

Pass a framing to `PsServer` (``PsServer(…, framing=Line())``), `PsClient` or `PsMultiClient`: then
each call of ``on_message`` gets one whole message, and ``send`` takes whole messages.

All of it is sans-I/O: bytes in, messages out. Nothing here knows of sockets or greenlets. A
`Framing` holds settings and serves any number of connections; a `Decoder` keeps the bytes of one
connection. A framing of your own is a small class: see `Framing`.

To add a framing to the library: write its class in a file of this package, add its name here and to
``__all__``, and add it to `psofa_gevent.cli.options` for the command line.
"""

from psofa_gevent.errors import PsFramingError
from psofa_gevent.framing.base import (
    DEFAULT_MAX_SIZE,
    SKIP,
    Decoded,
    Decoder,
    Framing,
    Need,
)
from psofa_gevent.framing.counted import FixedSize, LengthPrefix, Raw, Varint
from psofa_gevent.framing.delimited import Between, Delimiter, Line
from psofa_gevent.public import publish as _publish

__all__ = [
    "DEFAULT_MAX_SIZE",
    "SKIP",
    "Between",
    "Decoded",
    "Decoder",
    "Delimiter",
    "FixedSize",
    "Framing",
    "LengthPrefix",
    "Line",
    "Need",
    "PsFramingError",
    "Raw",
    "Varint",
]

_publish(__name__, __all__, globals())
