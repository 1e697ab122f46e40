"""Write docs/settings.md, the tables of all settings, from their descriptions in the package.

Usage: ``python docs/settings.py``, with the package of this checkout to be imported. A test fails
when the file is not what this writes.
"""

from __future__ import annotations

import dataclasses
import enum
from pathlib import Path

from psofa_gevent.connecting.settings import ClientSettings, ConnectingSettings
from psofa_gevent.listening.settings import ServerSettings
from psofa_gevent.settings import SessionSettings, Setting, described

FILE = Path(__file__).with_suffix(".md")
INTRODUCTION = """\
# Settings

All settings of `PsServer`, `PsClient` and `PsMultiClient` are keyword arguments of their
constructors. A value of the wrong type raises `TypeError`, one out of range `ValueError`; both name
the setting. `settings` of a server or client tells what is in effect, and cannot be changed:
`server.settings.idle_milliseconds`. To assign a setting to a server or client is an error, too.

`psofa serve` has an option for each setting of a server (`psofa serve --help`). Times in settings
that do not say milliseconds are seconds.

<!-- Made by docs/settings.py from the descriptions in psofa_gevent: change those, then run it. -->
"""
TABLES: tuple[tuple[str, type[SessionSettings], type[SessionSettings] | None], ...] = (
    ("Of sessions: servers and clients have them", SessionSettings, None),
    ("Of servers", ServerSettings, SessionSettings),
    ("Of both clients", ConnectingSettings, SessionSettings),
    ("Of `PsClient`", ClientSettings, ConnectingSettings),
)
"""The title, what describes them, and what describes those that are in another table."""
ALIASES = {
    "Given | Sequence[Given]": "socket | int | str | tuple[str, int] | Sequence[…]",
    "Heartbeat": "PsHeartbeat | tuple[int, Any]",
}
"""Types that have a name in the package only."""


def page() -> str:
    """The whole file."""
    parts = [INTRODUCTION]
    for title, settings, base in TABLES:
        known = described(base) if base is not None else {}
        rows = [row(each) for name, each in described(settings).items() if name not in known]
        head = ["| setting | type | default | what it is | what it trades |", "|" + " --- |" * 5]
        parts.append("\n".join([f"\n## {title}\n", *head, *rows, ""]))
    return "".join(parts)


def row(setting: Setting) -> str:
    """The row of one setting."""
    what = setting.what + (f". `None`: {setting.none}" if setting.none else "")
    default = "" if setting.default is dataclasses.MISSING else f"`{shown(setting.default)}`"
    annotation = setting.annotation
    for alias, spelled in ALIASES.items():
        annotation = annotation.replace(alias, spelled)
    cells = [f"`{setting.name}`", f"`{annotation}`", default, what, setting.trades]
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def shown(value: object) -> str:
    """A default as programs have it."""
    if isinstance(value, enum.Enum):
        return str(value)
    return f"{value:_}" if type(value) is int and value > 9_999 else repr(value)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
