"""What ``psofa serve`` prints of where it can be reached."""

from __future__ import annotations

from pathlib import Path

import gevent
import gevent.socket
import pytest

from command_line import assert_echoes, program, write_module
from marks import needs_ipv6
from psofa_gevent.cli import reach

pytestmark = pytest.mark.programs


@needs_ipv6
@pytest.mark.parametrize("arguments", [["--ipv6"], ["--host", "::1"]])
def test_serve_listens_on_the_ipv6_loopback(tmp_path: Path, arguments: list[str]) -> None:
    with program(tmp_path, "serve", "--port", "0", *arguments) as started:
        host, port = started.read_address()
        assert host == "::1"
        assert_echoes((host, port))


@needs_ipv6
def test_serve_on_the_ipv6_wildcard_serves_ipv4_clients_too(tmp_path: Path) -> None:
    with program(tmp_path, "serve", "--port", "0", "--host", "::") as started:
        _, port = started.read_address()
        assert_echoes(("127.0.0.1", port))
        assert_echoes(("::1", port))


PRETENDED_IFADDR = """
    from types import SimpleNamespace

    def get_adapters():
        ips = ["192.0.2.7", ("2001:db8::7", 0, 0)]
        return [SimpleNamespace(name="eth0", ips=[SimpleNamespace(ip=ip) for ip in ips])]
"""


def reached_at(directory: Path, host: str) -> tuple[int, str]:
    """What ``serve`` prints after its first line, and the port."""
    with program(directory, "serve", "--port", "0", "--host", host) as started:
        _, port = started.read_address()
        lines: list[str] = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(started.read_line())
        assert_echoes(("127.0.0.1", port))
        assert started.stop() == 0
        return port, "\n".join(lines)


def test_serve_on_every_address_lists_them(tmp_path: Path) -> None:
    write_module(tmp_path, "ifaddr", PRETENDED_IFADDR)
    port, text = reached_at(tmp_path, "0.0.0.0")
    assert f"reached at  192.0.2.7:{port}" in text
    assert "2001:db8::7" not in text


@needs_ipv6
def test_serve_on_the_ipv6_wildcard_lists_the_addresses_of_both_families(tmp_path: Path) -> None:
    write_module(tmp_path, "ifaddr", PRETENDED_IFADDR)
    port, text = reached_at(tmp_path, "::")
    assert f"[2001:db8::7]:{port}" in text
    assert f"192.0.2.7:{port}" in text


@pytest.mark.parametrize(
    ("ifaddr", "said"),
    [
        ("raise ImportError", 'pip install "psofa_gevent[network]"'),
        ("def get_adapters():\n    raise OSError('not told')", "not told"),
    ],
)
def test_serve_on_every_address_says_so_when_it_cannot_list_them(
    tmp_path: Path, ifaddr: str, said: str
) -> None:
    write_module(tmp_path, "ifaddr", ifaddr)
    _, text = reached_at(tmp_path, "0.0.0.0")
    assert "all addresses of this machine" in text
    assert said in text


def test_a_link_local_address_is_printed_with_its_interface() -> None:
    index, name = gevent.socket.if_nameindex()[0]
    text = reach.where_to_reach(("fe80::7", 8710, 0, index), serving="an echo")
    assert text.startswith(f"Listening on [fe80::7%{name}]:8710\n")
    assert f"nc fe80::7%{name} 8710" in text
