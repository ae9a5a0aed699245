"""The headers of a request, as session builders read them."""

import pytest

from worker import Headers, InvalidHeader


def test_names_compare_without_regard_to_case() -> None:
    headers = Headers([("X-Tenant", "acme")])
    assert headers["x-tenant"] == headers["X-TENANT"] == headers.get("X-tenant") == "acme"
    assert "X-TENANT" in headers
    assert headers.get_all("X-TENANT") == ("acme",)
    assert list(headers) == ["x-tenant"]


def test_a_missing_header_is_a_key_error_and_has_no_values() -> None:
    headers = Headers()
    with pytest.raises(KeyError, match="authorization"):
        headers["authorization"]
    assert headers.get("authorization") is None
    assert headers.get_all("authorization") == ()
    assert "authorization" not in headers
    assert len(headers) == 0


def test_a_header_that_was_sent_twice_has_no_one_value() -> None:
    """Neither by index nor by ``get``, which would otherwise hide that it is ambiguous."""
    headers = Headers([("authorization", "first"), ("other", "x"), ("Authorization", "second")])
    with pytest.raises(InvalidHeader, match="'authorization' was sent 2 times"):
        headers["Authorization"]
    with pytest.raises(InvalidHeader, match="2 times"):
        headers.get("authorization")
    assert headers.get_all("authorization") == ("first", "second")
    assert "authorization" in headers
    assert len(headers) == 2


def test_an_error_over_a_header_does_not_show_its_values() -> None:
    headers = Headers([("authorization", "secret-1"), ("authorization", "secret-2")])
    with pytest.raises(InvalidHeader) as caught:
        headers["authorization"]
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sent", "read"),
    [
        ("x-text", "text", "text"),
        ("x-text", b"text", "text"),
        ("x-text", "", ""),
        ("x-text", b"\xff", "\udcff"),
        ("x-trace-bin", b"\x00\xff", b"\x00\xff"),
        ("X-Trace-Bin", b"\x00\xff", b"\x00\xff"),
        ("x-trace-bin", "text", b"text"),
        ("x-trace-bin", bytearray(b"\x01"), b"\x01"),
    ],
)
def test_values_are_bytes_where_the_name_says_so_and_text_elsewhere(name: str, sent: str | bytes, read: object) -> None:
    value = Headers([(name, sent)])[name]
    assert value == read
    assert type(value) is type(read)


def test_names_that_are_no_text_are_not_there() -> None:
    number: object = 1
    assert number not in Headers([("1", "x")])


def test_its_repr_shows_names_and_no_values() -> None:
    assert repr(Headers([("Authorization", "Bearer secret"), ("x", "1")])) == "Headers(authorization, x)"


def test_it_cannot_be_changed() -> None:
    headers = Headers([("a", "1")])
    with pytest.raises(TypeError):
        headers["a"] = "2"  # type: ignore[index]
    with pytest.raises(AttributeError):
        headers.a = "2"  # type: ignore[attr-defined]


def test_it_is_a_mapping() -> None:
    headers = Headers([("A", "1"), ("b-bin", b"2")])
    assert dict(headers) == {"a": "1", "b-bin": b"2"} == headers
    assert list(headers.items()) == [("a", "1"), ("b-bin", b"2")]
