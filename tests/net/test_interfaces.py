"""`local_addresses`: the machine's addresses as people and `getaddrinfo` write them."""

from __future__ import annotations

import ipaddress
import sys
from types import SimpleNamespace

import gevent.socket
import pytest

from psofa_gevent import PsSocketAddressFamily
from psofa_gevent.net.interfaces import local_addresses

IPV4 = PsSocketAddressFamily.IPV4
IPV6 = PsSocketAddressFamily.IPV6


def pretend_adapters(patch: pytest.MonkeyPatch) -> None:
    """Two interfaces as the ifaddr library describes them."""
    adapters = [
        SimpleNamespace(
            name="lo", ips=[SimpleNamespace(ip="127.0.0.1"), SimpleNamespace(ip=("::1", 0, 0))]
        ),
        SimpleNamespace(
            name="eth0",
            ips=[
                SimpleNamespace(ip="192.0.2.7"),
                SimpleNamespace(ip=("2001:db8::7", 0, 0)),
                SimpleNamespace(ip=("fe80::7", 0, 3)),
            ],
        ),
    ]
    patch.setitem(sys.modules, "ifaddr", SimpleNamespace(get_adapters=lambda: adapters))


def test_each_family_has_its_own_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_adapters(monkeypatch)
    assert local_addresses(IPV4) == ["127.0.0.1", "192.0.2.7"]
    assert local_addresses(IPV6)[:2] == ["::1", "2001:db8::7"]


@pytest.mark.parametrize(("system", "zone"), [("posix", "eth0"), ("nt", "3")])
def test_a_link_local_address_names_its_interface(
    monkeypatch: pytest.MonkeyPatch, system: str, zone: str
) -> None:
    pretend_adapters(monkeypatch)
    monkeypatch.setattr("psofa_gevent.net.interfaces.os", SimpleNamespace(name=system))
    assert local_addresses(IPV6)[2] == f"fe80::7%{zone}"


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ifaddr", None)  # importing it raises ImportError
    with pytest.raises(ImportError, match=r'pip install "psofa_gevent\[network\]"') as caught:
        local_addresses(IPV4)
    assert caught.value.name == "ifaddr"


def test_the_addresses_are_those_of_this_machine() -> None:
    pytest.importorskip("ifaddr")
    assert "127.0.0.1" in local_addresses(IPV4)
    for address in local_addresses(IPV4):
        with gevent.socket.socket(gevent.socket.AF_INET) as sock:
            sock.bind((address, 0))  # refused for an address that is not ours
    for address in local_addresses(IPV6):
        assert ipaddress.IPv6Address(address).is_link_local == ("%" in address)
        [found, *_] = gevent.socket.getaddrinfo(address, 0, type=gevent.socket.SOCK_STREAM)
        with gevent.socket.socket(gevent.socket.AF_INET6) as sock:
            sock.bind(found[4])
