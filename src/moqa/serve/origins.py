"""Keeps pages of other sites, which a user's browser shows, away from a server on the user's own machine."""

import ipaddress
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.types import Scope

from moqa.errors import MoqaError
from moqa.serve.refusal import RefusalError


def check_origins(given: Collection[str]) -> None:
    """Check the origins that `--cors` names.

    >>> check_origins(["https://example.com", "http://localhost:3000", "*"])
    >>> check_origins(["example.com"])
    Traceback (most recent call last):
    moqa.errors.MoqaError: --cors example.com is not an origin: give one such as https://example.com, or *

    Raises:
        MoqaError: if one is not an origin.
    """
    for origin in given:
        parts = _split(origin)
        if origin != "*" and (parts is None or origin != f"{parts[0]}://{parts[1]}".lower()):
            raise MoqaError(f"--cors {origin} is not an origin", "give one such as https://example.com, or *")


def check_site(scope: Scope, headers: Mapping[bytes, bytes], cors: Collection[str]) -> None:
    """Refuse what a browser sends for a page of another site, if it comes over the loopback interface.

    A page can make its own name mean 127.0.0.1 (DNS rebinding): its requests then have that name in `Host`.

    Args:
        scope: the request, as ASGI has it.
        headers: of the request.
        cors: origins of pages that may ask.

    Raises:
        RefusalError: 403.
    """
    local, _ = scope.get("server") or ("", 0)
    if not _is_loopback(local):
        return
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name = (_split(f"http://{host}") or ("", "", ""))[2]
    if name != "localhost" and not name.endswith(".localhost") and not _is_loopback(name):
        raise RefusalError(403, "this server is on loopback: ask it as localhost, or give it a key", code="wrong_host")
    origin = headers.get(b"origin", b"").decode("latin-1").lower()
    if origin and not {origin, "*"} & set(cors) and origin not in (f"http://{host}", f"https://{host}"):
        raise RefusalError(403, "pages of other origins may not ask: see --cors", code="wrong_origin")


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    # a socket of IPv6 shows a client of IPv4 like this
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


def _split(origin: str) -> tuple[str, str, str] | None:
    """Scheme, host with port, and host of an origin; None for other text."""
    try:
        parts = urlsplit(origin)
        _ = parts.port  # raises if it is no number
    except ValueError:
        return None
    if not (parts.scheme and parts.hostname) or "@" in parts.netloc:
        return None
    return parts.scheme, parts.netloc, parts.hostname
