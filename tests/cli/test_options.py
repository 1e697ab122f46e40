"""The options of ``psofa serve`` are the settings of the server."""

from __future__ import annotations

import argparse
import inspect
import re
import ssl
from pathlib import Path
from typing import Any

import pytest

from command_line import run
from psofa_gevent import PsHeartbeat, PsOverflow, PsServer, PsSocketAddressFamily
from psofa_gevent.cli import main, options, serve
from psofa_gevent.listening.settings import ServerSettings
from psofa_gevent.settings import described


def test_help_of_serve_names_every_option_with_its_default(tmp_path: Path) -> None:
    text = " ".join(run(tmp_path, "serve", "--help").stdout.split())
    for name in [*server_settings(), "certificate", "key"]:
        if name not in ("socket_address_family", "ssl_context"):
            assert re.search(rf"{options.FLAGS[name]}\s", text)
    for setting in described(ServerSettings).values():
        if setting.name not in ("socket_address_family", "ssl_context", "framing", "heartbeat"):
            beginning = setting.what.partition(",")[0].partition("`")[0].partition(":")[0]
            assert setting.name in ("host", "listener") or beginning in text, setting.name
    for default in ("8710", "1024", "65536", "60000", "1.5", "5.0"):
        assert f"(default: {default}" in text
    assert "usage: python -m psofa_gevent serve [options] [module:attribute]" in text


def server_settings() -> dict[str, Any]:
    """The settings of `PsServer`, with their defaults."""
    parameters = inspect.signature(PsServer).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "callback"}


def settings_from(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    """What ``serve *arguments`` gives to `PsServer`."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        PsServer, "__init__", lambda _self, _callback, **settings: given.update(settings)
    )
    serve.make_server(serve.EchoCallback(), parsed("serve", *arguments))
    return given


def parsed(*arguments: str) -> argparse.Namespace:
    return main.build_parser("psofa").parse_args(arguments)


def test_the_defaults_are_those_of_the_server_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {**server_settings(), "host": "127.0.0.1"}
    assert settings_from(monkeypatch) == expected
    shutdown = inspect.signature(PsServer.shutdown).parameters
    assert parsed("serve").shutdown_timeout == shutdown["timeout"].default
    assert parsed("serve").drain == shutdown["drain"].default


def test_every_setting_of_the_server_has_an_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trustme = pytest.importorskip("trustme")
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    expected = {
        "host": "0.0.0.0",  # for --listener
        "port": 8710,  # the same
        "socket_address_family": PsSocketAddressFamily.IPV6,
        "backlog": 2,
        "receive_buffer_size": 3,
        "max_sessions": 4,
        "read_buffer_size": 5,
        "divide": 6,
        "idle_milliseconds": 7,
        "send_timeout": 8.5,
        "callback_timeout": 9.5,
        "linger_timeout": 10.5,
        "no_delay": False,
        "allow_half_open": True,
        "framing": options.FRAMINGS["line"],
        "frame_timeout": 11.5,
        "high_water": 12,
        "overflow": PsOverflow.DROP_OLDEST,
        "send_buffer_size": 17,
        "unsent_low_water": 18,
        "handshake_timeout": 13.5,
        "keep_alive": 14.5,
        "user_timeout": 15.5,
        "heartbeat": (16, "é\n".encode()),
        "unix_mode": 0o660,
        "ssl_context": None,
        "proxy_protocol": True,
        "trusted_proxies": ["10.0.0.1", "10.0.0.2"],
        "allowed_networks": ["10.0.0.0/8", "::1"],
        "denied_networks": ["10.1.0.0/16"],
        "max_sessions_per_peer": 16,
        "refuse_when_full": True,
        "farewell": "busy",
        "listener": [16],
        "reuse_port": True,
    }
    assert expected.keys() == server_settings().keys()  # none is forgotten
    words = ["--ipv6", "--no-delay", "off", "--allow-half-open", "--framing", "line"]
    files = ["--certificate", str(tmp_path / "cert.pem"), "--key", str(tmp_path / "key.pem")]
    arguments = [*words, "--overflow", "drop-oldest", "--unix-mode", "660", *files]
    arguments += ["--heartbeat", r"16,é\n"]
    arguments += ["--listener", "fd:16", "--reuse-port"]
    for name, value in expected.items():
        option = options.FLAGS.get(name, "")
        if type(value) in (int, float, str) and name not in ("host", "port", "unix_mode"):
            arguments += [option, str(value)]
        elif isinstance(value, list) and name != "listener":
            arguments += [text for each in value for text in (option, each)]
    arguments += ["--proxy-protocol", "--refuse-when-full"]
    settings = settings_from(monkeypatch, *arguments)
    assert isinstance(settings["ssl_context"], ssl.SSLContext)
    assert {**settings, "ssl_context": None} == expected
    assert settings_from(monkeypatch, "--port", "1")["port"] == 1
    raw = settings_from(monkeypatch, "--framing", "line", "--raw-heartbeat", "16,fff1")
    assert raw["heartbeat"] == PsHeartbeat(16, b"\xff\xf1", raw=True)


def test_listeners_are_written_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["127.0.0.1:0", "[::1]:80", "[fe80::1%eth0]:80", "localhost:8080", "unix:/a:b:c"]
    arguments = [word for text in texts for word in ("--listener", text)]
    settings = settings_from(monkeypatch, *arguments)
    assert settings["listener"] == [
        ("127.0.0.1", 0),
        ("::1", 80),
        ("fe80::1%eth0", 80),
        ("localhost", 8080),
        "unix:/a:b:c",
    ]
    assert settings["host"] == "0.0.0.0"


@pytest.mark.parametrize(
    "files", [["--certificate", "/nowhere/cert.pem"], ["--key", "key"], ["--certificate", __file__]]
)
def test_a_certificate_that_cannot_be_used_is_told_in_one_line(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["serve", "--port", "0", *files]) == 2
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    assert files[1] in output or "--certificate" in output
    assert ("--key must name the key" in output) == (__file__ in files)  # it was read, and had none


@pytest.mark.parametrize("word", ["none", "None"])
def test_a_word_switches_a_limit_off(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    names = (
        *("idle_milliseconds", "send_timeout", "callback_timeout", "frame_timeout"),
        *("handshake_timeout", "keep_alive", "user_timeout", "max_sessions_per_peer"),
    )
    arguments = [text for name in names for text in (f"--{name.replace('_', '-')}", word)]
    settings = settings_from(monkeypatch, *arguments)
    assert [settings[name] for name in names] == [None] * len(names)
