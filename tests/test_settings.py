"""What constructors and calls refuse, with an error that names the parameter and the value."""

from __future__ import annotations

import dataclasses
import decimal
import enum
import inspect
import math
import re
import runpy
import socket
import ssl
import sys
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest

from helpers import REPOSITORY
from psofa_gevent import (
    PsCallback,
    PsClient,
    PsHeartbeat,
    PsMultiClient,
    PsOverflow,
    PsReconnect,
    PsServer,
    PsSession,
    PsSocketAddressFamily,
    settings,
)
from psofa_gevent.client import ClientKeywords
from psofa_gevent.connecting.settings import ClientSettings, ConnectingSettings
from psofa_gevent.framing import Line
from psofa_gevent.listening.settings import ServerSettings
from psofa_gevent.multi_client import MultiClientKeywords
from psofa_gevent.net import sockopts
from psofa_gevent.server import ServerKeywords
from psofa_gevent.settings import SessionKeywords, SessionSettings, described
from psofa_gevent.testing import RecordingCallback, ServerFactory, connected_session

Make = Callable[..., Any]

NAN = math.nan
INFINITY = math.inf
TOO_LARGE_FOR_A_FLOAT = 10**400


def make_server(**settings: Any) -> PsServer:
    return PsServer(PsCallback(), **settings)


def make_client(*, host: Any = "127.0.0.1", port: Any = 1, **settings: Any) -> PsClient:
    return PsClient(PsCallback(), host, port, **settings)


def make_multi_client(**settings: Any) -> PsMultiClient:
    return PsMultiClient(PsCallback(), **settings)


OWNERS: list[Make] = [make_server, make_client, make_multi_client]

SESSION_SETTINGS = {
    "read_buffer_size": 65536,
    "divide": 10,
    "idle_milliseconds": 60_000,
    "send_timeout": 1.5,
    "callback_timeout": None,
    "linger_timeout": 1.0,
    "no_delay": True,
    "allow_half_open": False,
    "framing": None,
    "frame_timeout": None,
    "high_water": 1_048_576,
    "overflow": PsOverflow.CLOSE,
    "send_buffer_size": None,
    "unsent_low_water": None,
    "keep_alive": None,
    "user_timeout": None,
    "heartbeat": None,
}

NOT_WHOLE_NUMBERS: list[Any] = ["10", b"10", 10.0, NAN, INFINITY, True, False, [10], object]
NOT_SECONDS: list[Any] = ["1", b"1", True, False, [1.0], 1j, decimal.Decimal(1), object]
SECONDS_OUT_OF_RANGE: list[Any] = [
    *(-1, -0.001, NAN, INFINITY, -INFINITY),
    *(1e300, TOO_LARGE_FOR_A_FLOAT),  # more than an event loop can wait
]
NOT_BOOLS: list[Any] = [0, 1, "yes", "", None, 1.0]
NOT_NETWORKS: list[Any] = ["10.0.0.0/8", "", b"10.0.0.1", 10, True, [10], [None], [b"::1"], object]
NO_NETWORKS: list[Any] = [
    *([""], ["localhost"], ["10.0.0"], ["10.0.0.0/33"], ["::1/129"], ["10.0.0.0/-1"]),
    *(["10.0.0.1/8"], ["::1", "0x7f.0.0.1"], ["010.0.0.1"], ["unix:/run/x"], ["10.0.0.1:80"]),
    *(["fe80::1%eth0"], ["fe80::%eth0/10"]),
]

WRONG_TYPES: dict[str, list[Any]] = {
    "read_buffer_size": [*NOT_WHOLE_NUMBERS, None],
    "divide": [*NOT_WHOLE_NUMBERS, None],
    "idle_milliseconds": NOT_WHOLE_NUMBERS,
    "send_timeout": NOT_SECONDS,
    "callback_timeout": NOT_SECONDS,
    "linger_timeout": [*NOT_SECONDS, None],
    "no_delay": NOT_BOOLS,
    "allow_half_open": NOT_BOOLS,
    "framing": [Line, "Line", b"\n", 1, True],
    "frame_timeout": NOT_SECONDS,
    "high_water": [*NOT_WHOLE_NUMBERS, None],
    "overflow": ["CLOSE", 1, None, PsOverflow],
    "send_buffer_size": NOT_WHOLE_NUMBERS,
    "unsent_low_water": NOT_WHOLE_NUMBERS,
    "keep_alive": NOT_SECONDS,
    "user_timeout": NOT_SECONDS,
    "heartbeat": [
        *(b"ping", 1000, [1, b"x"], (1,), (1, b"x", 2), (1.5, b"x"), (1, None), (1, 2)),
        *((1, b"x", True, 0), PsHeartbeat(1, b"x", raw=None)),  # type: ignore[arg-type]  # what is tested
        *(PsHeartbeat(1, None, raw=True), PsHeartbeat(1, {}, raw=True)),
    ],
}
OUT_OF_RANGE: dict[str, list[Any]] = {
    "read_buffer_size": [0, -1, 2**31, 2**63, TOO_LARGE_FOR_A_FLOAT],
    "divide": [0, -1, 2**63],
    "idle_milliseconds": [0, -1, TOO_LARGE_FOR_A_FLOAT],
    "send_timeout": SECONDS_OUT_OF_RANGE,
    "callback_timeout": [*SECONDS_OUT_OF_RANGE, 0, 0.0],
    "linger_timeout": SECONDS_OUT_OF_RANGE,
    "frame_timeout": [*SECONDS_OUT_OF_RANGE, 0, 0.0],
    "high_water": [0, -1, 2**63, TOO_LARGE_FOR_A_FLOAT],
    "send_buffer_size": [0, -1, 2**31, TOO_LARGE_FOR_A_FLOAT],
    "unsent_low_water": [0, -1, 2**31, TOO_LARGE_FOR_A_FLOAT],
    "keep_alive": [*SECONDS_OUT_OF_RANGE, 0, 32_768],
    "user_timeout": [*SECONDS_OUT_OF_RANGE, 0, 2_000_001],
    "heartbeat": [
        *((0, b"x"), (-1, b"x"), (1, b""), (1, ""), PsHeartbeat(1, b"", raw=True)),
        (1, "\ud800"),
    ],
}
WRONG_TYPES_OF_SERVERS: dict[str, list[Any]] = {
    "unix_mode": ["660", 0.5, True, object],
    "listener": [True, 0.5, b"unix:/x", {}, object, ("::1", True), ("::1", "80")],
    "reuse_port": NOT_BOOLS,
    "host": [None, b"127.0.0.1", 127, ("127.0.0.1", 80), True],
    "port": [*NOT_WHOLE_NUMBERS, None],
    "socket_address_family": [None, "IPV4", 4, True, socket.AF_INET, PsSocketAddressFamily],
    "backlog": [*NOT_WHOLE_NUMBERS, None],
    "receive_buffer_size": NOT_WHOLE_NUMBERS,
    "max_sessions": NOT_WHOLE_NUMBERS,
    "proxy_protocol": NOT_BOOLS,
    "trusted_proxies": [*NOT_NETWORKS, None],
    "allowed_networks": NOT_NETWORKS,
    "denied_networks": [*NOT_NETWORKS, None],
    "max_sessions_per_peer": NOT_WHOLE_NUMBERS,
    "refuse_when_full": NOT_BOOLS,
    "farewell": [1, True, ["busy"], bytearray(b"busy"), object],
}
OUT_OF_RANGE_OF_SERVERS: dict[str, list[Any]] = {
    "host": ["", "127.0.0.1\0", "local\0host"],
    "port": [-1, 65_536, 2**63],
    "listener": [
        *("", "127.0.0.1:80", "unix:", "unix:/" + "x" * 107, "unix:/x\0"),
        *((), [], -1, 2**63, ("unix:/x", 1), ("", 1), ("::1", -1), ("::1", 65_536)),
    ],
    "backlog": [-1, 2**31],
    "receive_buffer_size": [0, -1, 2**31],
    "max_sessions": [0, -1],
    "trusted_proxies": NO_NETWORKS,
    "allowed_networks": NO_NETWORKS,
    "denied_networks": NO_NETWORKS,
    "max_sessions_per_peer": [0, -1, 2**31],
    "farewell": ["\ud800", "", b"", b"x" * 4_097],
}


def each(table: dict[str, list[Any]], *names: str) -> list[Any]:
    """A test case for every value in `table`, or for those of the parameters `names`."""
    return [
        pytest.param(name, value, id=f"{name}={shown(value)}")
        for name, values in table.items()
        for value in values
        if not names or name in names
    ]


def shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) < 40 else f"{text[:10]}..."


def refuse(make: Make, error: type[Exception], name: str, value: object) -> None:
    """Expect `error`, and a message that names parameter and value."""
    with pytest.raises(error) as refused:
        make(**{name: value})
    message = str(refused.value)
    assert name in message
    assert repr(value) in message


@pytest.mark.parametrize("make", OWNERS)
@pytest.mark.parametrize(("name", "value"), each(WRONG_TYPES))
def test_session_setting_of_the_wrong_type_is_a_type_error(
    make: Make, name: str, value: object
) -> None:
    refuse(make, TypeError, name, value)


@pytest.mark.parametrize("make", OWNERS)
@pytest.mark.parametrize(("name", "value"), each(OUT_OF_RANGE))
def test_session_setting_out_of_range_is_a_value_error(
    make: Make, name: str, value: object
) -> None:
    refuse(make, ValueError, name, value)


@pytest.mark.parametrize(("name", "value"), each(WRONG_TYPES_OF_SERVERS))
def test_server_setting_of_the_wrong_type_is_a_type_error(name: str, value: object) -> None:
    refuse(make_server, TypeError, name, value)


@pytest.mark.parametrize(("name", "value"), each(OUT_OF_RANGE_OF_SERVERS))
def test_server_setting_out_of_range_is_a_value_error(name: str, value: object) -> None:
    refuse(make_server, ValueError, name, value)


CLIENT_PARAMETERS = ("host", "port", "socket_address_family")


@pytest.mark.parametrize(("name", "value"), each(WRONG_TYPES_OF_SERVERS, *CLIENT_PARAMETERS))
def test_clients_refuse_a_target_of_the_wrong_type(name: str, value: object) -> None:
    refuse(make_client, TypeError, name, value)
    refuse(connect_one_of_many, TypeError, name, value)


@pytest.mark.parametrize(
    ("name", "value"), [*each(OUT_OF_RANGE_OF_SERVERS, *CLIENT_PARAMETERS), ("port", 0)]
)
def test_clients_refuse_a_target_out_of_range(name: str, value: object) -> None:
    refuse(make_client, ValueError, name, value)
    refuse(connect_one_of_many, ValueError, name, value)


def connect(**arguments: Any) -> PsSession:
    return make_client().connect(**arguments)


def connect_one_of_many(*, host: Any = "127.0.0.1", port: Any = 1, **arguments: Any) -> None:
    with PsMultiClient(PsCallback()) as bundle:
        bundle.connect(host, port, **arguments)


@pytest.mark.parametrize("make", [connect, connect_one_of_many])
@pytest.mark.parametrize("value", ["3a910a33-e164-42c4-b53d-ef5925af85b0", b"id", 7, 0, "", False])
def test_connection_id_that_is_no_uuid_is_a_type_error(make: Make, value: object) -> None:
    refuse(make, TypeError, "connection_id", value)


def shut_down(**arguments: Any) -> None:
    make_server().shutdown(**arguments)


def shut_down_a_started_one(**arguments: Any) -> None:
    server = PsServer(PsCallback(), host="127.0.0.1", port=0)
    with server:
        try:
            server.shutdown(**arguments)
        finally:
            assert server.started


def disconnect(**arguments: Any) -> None:
    make_client().disconnect(**arguments)


def destroy_bundle(**arguments: Any) -> None:
    make_multi_client().destroy_bundle(**arguments)


CALLS_WITH_TIMEOUT: list[Make] = [
    connect,
    connect_one_of_many,
    shut_down,
    shut_down_a_started_one,
    disconnect,
    destroy_bundle,
]


@pytest.mark.parametrize("call", CALLS_WITH_TIMEOUT)
def test_timeout_that_is_no_number_is_a_type_error(call: Make) -> None:
    for value in NOT_SECONDS:
        refuse(call, TypeError, "timeout", value)


@pytest.mark.parametrize("call", CALLS_WITH_TIMEOUT)
def test_timeout_out_of_range_is_a_value_error(call: Make) -> None:
    for value in SECONDS_OUT_OF_RANGE:
        refuse(call, ValueError, "timeout", value)


@pytest.mark.parametrize("call", [shut_down, shut_down_a_started_one])
def test_drain_must_be_a_number_of_seconds(call: Make) -> None:
    for value in [*NOT_SECONDS, None]:
        refuse(call, TypeError, "drain", value)
    for value in SECONDS_OUT_OF_RANGE:
        refuse(call, ValueError, "drain", value)


@pytest.mark.parametrize("make", OWNERS)
@pytest.mark.parametrize(
    ("option", "name", "value"),
    [("USER_TIMEOUT", "user_timeout", 5.0), ("UNSENT_LOW_WATER", "unsent_low_water", 4_096)],
)
def test_an_option_that_the_system_has_not_is_a_value_error(
    make: Make, option: str, name: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, option, None)
    refuse(make, ValueError, name, value)
    make(**{name: None})


def test_wait_for_refuses_what_is_no_timeout(ps_server: ServerFactory) -> None:
    for server in (make_server(), ps_server(PsCallback())):
        for value in NOT_SECONDS:
            refuse(server.wait_for, TypeError, "timeout", value)
        for value in SECONDS_OUT_OF_RANGE:
            refuse(server.wait_for, ValueError, "timeout", value)


def test_session_calls_refuse_bad_times_and_stay_open() -> None:
    callback = RecordingCallback()
    with connected_session(callback) as connected:
        session = connected.session
        for value in NOT_WHOLE_NUMBERS:
            refuse(session.change_idle_milliseconds, TypeError, "idle_milliseconds", value)
        for value in OUT_OF_RANGE["idle_milliseconds"]:
            refuse(session.change_idle_milliseconds, ValueError, "idle_milliseconds", value)
        assert session.is_open


def test_bad_send_timeout_is_refused_before_anything_is_sent() -> None:
    """Not only where the send happens to wait: a wrong call fails in the first test of it."""
    with connected_session(RecordingCallback()) as connected:
        for value in NOT_SECONDS:
            with pytest.raises(TypeError, match="timeout"):
                connected.session.send(b"x", timeout=value)
        for value in SECONDS_OUT_OF_RANGE:
            with pytest.raises(ValueError, match="timeout"):
                connected.session.send(b"x", timeout=value)
        assert connected.session.bytes_sent == 0
        assert connected.session.is_open


GOOD_VALUES: dict[str, list[Any]] = {
    "read_buffer_size": [1, 2**31 - 1],
    "divide": [1, 100],
    "idle_milliseconds": [1, 2**31, None],
    "send_timeout": [0, 0.5, 3, 1e6, None],
    "callback_timeout": [0.001, 3, 1e6, None],
    "linger_timeout": [0, 0.0, 0.5, 1e6],
    "no_delay": [True, False],
    "allow_half_open": [True, False],
    "framing": [Line(), None],
    "frame_timeout": [0.001, 3, 1e6, None],
    "high_water": [1, 2**40],
    "send_buffer_size": [1, 2**31 - 1, None],
    "unsent_low_water": [1, 2**31 - 1, None] if sockopts.UNSENT_LOW_WATER is not None else [None],
    "overflow": list(PsOverflow),
    "keep_alive": [0.1, 60, 32_767, None],
    "heartbeat": [
        *((1, b"x"), (60_000, "text"), (5, lambda _session: b"x"), None),
        *(PsHeartbeat(1, b"x"), PsHeartbeat(1, "\n", raw=True), (1, b"x", True)),
    ],
    "user_timeout": [0.1, 30, None] if hasattr(socket, "TCP_USER_TIMEOUT") else [None],
}


@pytest.mark.parametrize("make", OWNERS)
@pytest.mark.parametrize(("name", "value"), each(GOOD_VALUES))
def test_session_setting_within_its_range_is_taken(make: Make, name: str, value: object) -> None:
    make(**{name: value})


GOOD_VALUES_OF_SERVERS: dict[str, list[Any]] = {
    "trusted_proxies": [(), [], {"10.0.0.0/8"}, ("::1", "fe80::/10"), {"192.0.2.7": "the front"}],
    "allowed_networks": [None, [], ["0.0.0.0/0", "::/0"], frozenset({"::ffff:10.0.0.0/104"})],
    "denied_networks": [(), ["192.0.2.7"]],
    "max_sessions_per_peer": [None, 1, 2**31 - 1],
    "farewell": [None, "too many of us", b"\xff", "x" * 4_096],
}


@pytest.mark.parametrize(("name", "value"), each(GOOD_VALUES_OF_SERVERS))
def test_server_setting_within_its_range_is_taken(name: str, value: object) -> None:
    make_server(**{name: value})


def test_a_farewell_that_tls_would_not_understand_is_refused() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(ValueError, match=r"farewell must be None.*'busy'.*unencrypted"):
        make_server(farewell="busy", ssl_context=context)


@pytest.mark.parametrize("owner", [PsServer, PsClient, PsMultiClient])
def test_session_settings_and_their_defaults_are_the_same_on_all_owners(owner: type) -> None:
    parameters = inspect.signature(owner).parameters
    assert {name: parameters[name].default for name in SESSION_SETTINGS} == SESSION_SETTINGS
    for name in SESSION_SETTINGS:
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_server_defaults_are_those_of_the_original_where_it_has_them() -> None:
    parameters = inspect.signature(PsServer).parameters
    defaults = {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in SESSION_SETTINGS and name != "callback"
    }
    assert defaults == {
        "host": "0.0.0.0",
        "port": 8710,
        "listener": None,
        "socket_address_family": PsSocketAddressFamily.IPV4,
        "backlog": 1024,
        "receive_buffer_size": None,
        "max_sessions": None,
        "unix_mode": None,
        "reuse_port": False,
        "ssl_context": None,
        "handshake_timeout": 10.0,
        "proxy_protocol": False,
        "trusted_proxies": ("127.0.0.0/8", "::1/128"),
        "allowed_networks": None,
        "denied_networks": (),
        "max_sessions_per_peer": None,
        "refuse_when_full": False,
        "farewell": None,
    }


def test_numbers_that_are_named_constants_are_numbers(ps_server: ServerFactory) -> None:
    class Our(enum.IntEnum):
        PORT = 0
        SIZE = 1024

    server = ps_server(PsCallback(), port=Our.PORT, read_buffer_size=Our.SIZE)
    assert server.started


def test_constructors_open_nothing() -> None:
    """Two servers for one port: only one of them can start, but both can be made."""
    first, second = make_server(port=8710), make_server(port=8710)
    assert not first.started
    assert not second.started
    assert first.address == second.address == ("0.0.0.0", 8710)


@pytest.mark.parametrize(
    ("owner", "keywords"),
    [
        (PsServer, ServerKeywords),
        (PsClient, ClientKeywords),
        (PsMultiClient, MultiClientKeywords),
    ],
)
def test_type_checkers_know_every_parameter_that_a_constructor_takes_by_name(
    owner: type, keywords: type
) -> None:
    parameters = inspect.signature(owner).parameters.values()
    by_name = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert set(keywords.__annotations__) | set(SessionKeywords.__annotations__) == (
        by_name - {"framing"}
    )


# -- one description of each


DESCRIBED: list[Any] = [
    pytest.param(PsServer, ServerSettings, ServerKeywords, id="PsServer"),
    pytest.param(PsClient, ClientSettings, ClientKeywords, id="PsClient"),
    pytest.param(PsMultiClient, ConnectingSettings, MultiClientKeywords, id="PsMultiClient"),
]


@pytest.mark.parametrize(("owner", "described_by", "keywords"), DESCRIBED)
def test_a_constructor_takes_what_is_described(
    owner: type, described_by: type[SessionSettings], keywords: type
) -> None:
    parameters = {
        name: (parameter.annotation, parameter.default)
        for name, parameter in inspect.signature(owner).parameters.items()
        if name != "callback"
    }
    needed = {dataclasses.MISSING: inspect.Parameter.empty}
    descriptions = {
        name: (each.annotation, needed.get(each.default, each.default))
        for name, each in described(described_by).items()
    }
    assert parameters == descriptions
    of_sessions = list(described(SessionSettings))
    assert [name for name in parameters if name in of_sessions] == of_sessions


@pytest.mark.parametrize(("owner", "described_by", "keywords"), DESCRIBED)
def test_type_checkers_know_the_types_that_are_described(
    owner: type, described_by: type[SessionSettings], keywords: type
) -> None:
    descriptions = described(described_by)
    known = {**SessionKeywords.__annotations__, **keywords.__annotations__}
    for name, annotation in known.items():
        spelled = getattr(annotation, "__forward_arg__", annotation)
        assert spelled == descriptions[name].annotation, name


@pytest.mark.parametrize(("owner", "described_by", "keywords"), DESCRIBED)
def test_the_docstring_of_a_constructor_tells_of_each_setting(
    owner: type, described_by: type[SessionSettings], keywords: type
) -> None:
    text = inspect.getdoc(owner.__init__)  # type: ignore[misc]  # of the class that is given
    assert text is not None
    told = re.findall(r"^    (\w+): ", text.partition("Raises:")[0], re.MULTILINE)
    assert set(told) == {"callback", *described(described_by)}


@pytest.mark.parametrize("described_by", [ServerSettings, ClientSettings, ConnectingSettings])
def test_descriptions_are_one_line_each_and_say_what_none_means(
    described_by: type[SessionSettings],
) -> None:
    for name, each in described(described_by).items():
        assert each.what, name
        assert "\n" not in each.what + each.trades + each.none, name
        assert bool(each.none) == each.annotation.endswith("| None"), name


def test_the_tables_of_the_documentation_are_what_is_described() -> None:
    made = runpy.run_path(str(REPOSITORY / "docs/settings.py"))
    text = (REPOSITORY / "docs/settings.md").read_text(encoding="utf-8")
    assert text == made["page"](), "run: python docs/settings.py"
    for name in {**described(ServerSettings), **described(ClientSettings)}:
        assert f"| `{name}` |" in text
    assert "(docs/settings.md)" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


# -- what is in effect


@pytest.mark.parametrize("make", OWNERS)
def test_an_owner_tells_its_settings_given_or_not(make: Make) -> None:
    given = {"idle_milliseconds": 7, "framing": Line(), "overflow": PsOverflow.DROP_OLDEST}
    told = make(**given).settings
    expected = {**SESSION_SETTINGS, **given, "unsent_low_water": told.unsent_low_water}
    assert {name: getattr(told, name) for name in SESSION_SETTINGS} == expected


def test_the_owners_tell_their_own_settings() -> None:
    server = make_server(listener=["unix:/tmp/x", ("::1", 0)], backlog=3)
    assert (server.settings.port, server.settings.backlog) == (8710, 3)
    assert server.settings.listener == ("unix:/tmp/x", ("::1", 0))
    client = make_client(endpoints=[("localhost", 2)], source_address=("127.0.0.1", 0))
    assert (client.settings.host, client.settings.port) == ("127.0.0.1", 1)
    assert client.settings.endpoints == (("localhost", 2),)
    assert client.settings.source_address == ("127.0.0.1", 0)


@pytest.mark.parametrize("make", OWNERS)
def test_the_settings_of_an_owner_are_read_only(make: Make) -> None:
    owner = make()
    with pytest.raises(AttributeError):
        owner.settings = owner.settings
    with pytest.raises(AttributeError):
        owner.settings.idle_milliseconds = 1
    assert owner.settings.idle_milliseconds == 60_000


def test_a_list_that_changes_later_changes_no_setting() -> None:
    networks = ["10.0.0.0/8"]
    server = make_server(allowed_networks=networks)
    networks.append("192.0.2.7")
    assert server.settings.allowed_networks == ("10.0.0.0/8",)


def test_settings_tell_what_was_chosen_where_one_left_it_open(ps_server: ServerFactory) -> None:
    server = ps_server(PsCallback(), high_water=100_000)
    assert server.settings.max_sessions == server._manager.pool.size  # type: ignore[union-attr]  # it is started
    if sys.platform == "linux":
        assert server.settings.unsent_low_water == 400_000
        assert make_client(high_water=2**30).settings.unsent_low_water is None  # the kernel's own
    assert make_server().settings.max_sessions is not None
    assert make_server(max_sessions=3).settings.max_sessions == 3
    assert make_client(reconnect=True).settings.reconnect == PsReconnect()
    assert isinstance(make_multi_client(ssl_context=True).settings.ssl_context, ssl.SSLContext)


def test_settings_tell_the_certificate_that_was_reloaded() -> None:
    first, second = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER) for _ in range(2))
    server = make_server(ssl_context=first)
    assert server.settings.ssl_context is first
    server.reload_tls(second)
    assert server.settings.ssl_context is second


# -- attributes that are none


@pytest.mark.parametrize("make", OWNERS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("idle_milliseconds", "'idle_milliseconds': it is a setting: give it to the constructor"),
        ("idle_miliseconds", "did you mean the setting idle_milliseconds"),
        ("get_sesion_count", "did you mean get_session_count?"),
        ("colour_of_the_sky", "a subclass may have attributes of its own"),
    ],
)
def test_an_unknown_attribute_is_an_error_that_names_the_nearest_one(
    make: Make, name: str, said: str
) -> None:
    owner = make()
    with pytest.raises(AttributeError, match=re.escape(said)):
        setattr(owner, name, 1)
    assert not hasattr(owner, name)


def test_type_checkers_see_that_an_attribute_is_unknown() -> None:
    """The ignored errors are the test: mypy reports an ignore that is not needed."""
    server = PsServer(PsCallback())
    with pytest.raises(AttributeError):
        server.idle_miliseconds = 1  # type: ignore[attr-defined]  # what is tested
    with pytest.raises(AttributeError):
        server.settings.divide = 1  # type: ignore[misc]  # what is tested


class Gateway(PsServer):
    """A server with attributes of its own."""

    limit = 3
    port: int

    def __init__(self, database: object) -> None:
        self.database = database
        super().__init__(PsCallback(), host="127.0.0.1", port=0)
        self.routes: dict[str, str] = {}


def test_a_subclass_has_attributes_of_its_own() -> None:
    server = Gateway("a database")
    server.limit = 4
    server.port = 5  # a setting's name, and declared
    server.routes = {"a": "b"}
    assert (server.database, server.limit, server.port) == ("a database", 4, 5)
    assert server.settings.port == 0


def test_a_setting_that_a_subclass_does_not_declare_is_an_error_there_too() -> None:
    server: Any = Gateway(None)
    with pytest.raises(AttributeError, match="it is a setting"):
        server.send_timeout = 3.0


@pytest.mark.parametrize("make", OWNERS)
def test_methods_of_one_owner_can_be_replaced_in_tests(make: Make) -> None:
    owner = make()
    with mock.patch.object(owner, "broadcast") as replaced:
        owner.broadcast(b"x")
    replaced.assert_called_once_with(b"x")
    assert owner.broadcast(b"x") is None
    assert weakref.ref(owner)() is owner
