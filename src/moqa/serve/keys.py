"""The API key that a request brings."""

import base64
from collections.abc import Mapping


def given_key(headers: Mapping[bytes, bytes]) -> bytes:
    """The key in the headers, as programs (Bearer) or browsers (Basic, with any user name) send it.

    A browser sends it with what other sites' pages ask for as well: that counts as no key.

    >>> given_key({b"authorization": b"Bearer secret"}), given_key({b"authorization": b"Basic bWU6c2VjcmV0"})
    (b'secret', b'secret')
    """
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value
    if scheme.lower() == b"basic" and headers.get(b"origin", b"").partition(b"://")[2] in (b"", headers.get(b"host")):
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""
