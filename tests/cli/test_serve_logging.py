"""The log of ``psofa serve``, beside that of the application that it serves."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest

import helpers
from command_line import assert_echoes, program, write_module
from psofa_gevent.testing import ScriptedClient

pytestmark = pytest.mark.programs


SETS_UP_LOGGING = {
    "basicConfig": "logging.basicConfig(level=logging.INFO, format='OURS %(message)s')",
    "root": """
handler = logging.StreamHandler()
handler.setFormatter(logging.Formatter('OURS %(message)s'))
logging.getLogger().addHandler(handler)
logging.getLogger().setLevel(logging.INFO)
""",
    "dictConfig": """
import logging.config
logging.config.dictConfig({
    "version": 1,
    "formatters": {"ours": {"format": "OURS %(message)s"}},
    "handlers": {"ours": {"class": "logging.StreamHandler", "formatter": "ours"}},
    "loggers": {"psofa_gevent": {"handlers": ["ours"], "level": "INFO"}},
})
""",
}
APP_THAT_LOGS = """
import logging
from psofa_gevent import PsCallback

def make():
    {}
    return PsCallback()
"""


@pytest.mark.parametrize("how", SETS_UP_LOGGING)
@pytest.mark.parametrize("where", ["imported", "called"])
def test_logging_that_the_application_has_set_up_is_left_alone(
    how: str, where: str, tmp_path: Path
) -> None:
    set_up = SETS_UP_LOGGING[how].strip()
    if where == "imported":
        source = APP_THAT_LOGS.format("pass") + set_up
    else:
        source = APP_THAT_LOGS.format(textwrap.indent(set_up, "    ").strip())
    (tmp_path / "app.py").write_text(source)
    with program(tmp_path, "serve", "app:make", "--port", "0") as started:
        started.read_address()
        assert started.stop() == 0
    ours = [line for line in started.log if line.startswith("OURS ")]
    assert ours == started.log  # each record once, and in the application's way
    assert "listening" in ours[-3]
    assert "SIGTERM: shutting down" in ours[-2]
    assert "stopped" in ours[-1]


def test_the_log_level_is_that_of_our_logger_where_the_application_has_set_up_logging(
    tmp_path: Path,
) -> None:
    set_up = SETS_UP_LOGGING["basicConfig"]
    (tmp_path / "app.py").write_text(APP_THAT_LOGS.format("pass") + set_up)
    options = ["--port", "0", "--log-level", "debug"]
    with program(tmp_path, "serve", "app:make", *options) as started:
        ScriptedClient(started.read_address()).close()
        started.read_log(": closed")
        assert started.stop() == 0
    assert all(line.startswith("OURS ") for line in started.log)


def test_a_level_that_the_application_has_given_to_the_root_logger_stays(tmp_path: Path) -> None:
    set_up = "logging.getLogger().setLevel(logging.ERROR)"
    (tmp_path / "app.py").write_text(APP_THAT_LOGS.format("pass") + set_up)
    with program(tmp_path, "serve", "app:make", "--port", "0") as started:
        started.read_address()
        assert started.stop() == 0
    assert started.log == []
    with program(tmp_path, "serve", "app:make", "--port", "0", "--log-level", "info") as started:
        started.read_address()
        assert started.stop() == 0
    assert "INFO    psofa_gevent: <PsServer" in "".join(started.log)


@pytest.mark.parametrize("level", [None, "debug", "warning"])
def test_without_logging_of_the_application_serve_logs_at_its_level(
    level: str | None, tmp_path: Path
) -> None:
    options = [] if level is None else ["--log-level", level]
    with program(tmp_path, "serve", "--port", "0", *options) as started:
        with ScriptedClient(started.read_address()) as client:
            client.send("x")
            client.expect("x")
        assert started.stop() == 0
    text = "".join(started.log)
    assert (": opened" in text) == (level == "debug")
    assert ("INFO    psofa_gevent: <PsServer" in text) == (level != "warning")


def test_what_goes_wrong_while_the_application_is_imported_is_seen(tmp_path: Path) -> None:
    write_module(
        tmp_path,
        "app",
        """
        import logging
        from psofa_gevent import PsCallback
        from psofa_gevent.hub import logs

        logging.getLogger("app").error("of the application")
        logs.log(logging.ERROR, "of the library")
        logging.basicConfig(format="OURS %(message)s")
        logs.log(logging.ERROR, "of the library, later")
        """,
    )
    with program(tmp_path, "serve", "app:PsCallback", "--port", "0") as started:
        started.read_address()
        assert started.stop() == 0
    assert started.log == [
        "of the application\n",
        "of the library\n",
        "OURS of the library, later\n",
    ]


def test_serve_serves_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    port = helpers.free_port()
    try:
        with program(tmp_path, "serve", "--port", str(port), stdout=writer) as started:
            helpers.wait_until_accepting(("127.0.0.1", port))
            assert_echoes(("127.0.0.1", port))
            assert started.stop() == 0
            assert "Traceback" not in "".join(started.log)
    finally:
        os.close(writer)
