"""A signed POST to an address of the settings, and how its receiver checks it.

The header `Face-MLLM-Signature: t=TIME,v1=HEX` holds the HMAC-SHA256 of `TIME.BODY` (TIME in seconds since 1970), as
Stripe's does; `Face-MLLM-Delivery` is the same for every try of one notice. No redirect is followed, no proxy is asked,
nothing of the reply but its status is read.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
import time
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit

from facemllm.errors import UserError, one_line
from facemllm.settings.operations import named_private

SIGNATURE, DELIVERY, EVENT = "Face-MLLM-Signature", "Face-MLLM-Delivery", "Face-MLLM-Event"
LIMIT_S = 10.0


class Temporary(UserError):
    """A failure that may be gone at the next try."""


def verify(secret: bytes, header: str, body: bytes, now: float, tolerance_s: float = 300) -> bool:
    """Whether `body` was signed with `secret` at most `tolerance_s` seconds before or after `now`."""
    parts = dict(part.split("=", 1) for part in header.split(",") if "=" in part)
    stamp, given = parts.get("t", ""), parts.get("v1", "")
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) < 16) or abs(now - int(stamp)) > tolerance_s:
        return False
    wanted = hmac.new(secret, stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return hmac.compare_digest(wanted.encode(), given.encode())


def signature(secret: bytes, body: bytes, now: float) -> str:
    """The header that `verify` accepts."""
    stamp = str(int(now))
    return f"t={stamp},v1={hmac.new(secret, stamp.encode() + b'.' + body, hashlib.sha256).hexdigest()}"


def post(address: str, secret: bytes, body: bytes, headers: Mapping[str, str], limit_s: float = LIMIT_S) -> None:
    """POST a JSON body, signed anew. Raises UserError when it was refused, Temporary when another try may succeed.

    The connection goes to the very address that was checked, whatever the name points to by then.
    """
    import httpx

    url = httpx.URL(address)
    where = checked_address(url.host, url.port or (443 if url.scheme == "https" else 80))
    sent = {"Content-Type": "application/json", "User-Agent": "face-mllm", "Host": url.netloc.decode(), **headers}
    sent[SIGNATURE] = signature(secret, body, time.time())
    safe = ssl.create_default_context()  # this machine's certificates, or those of SSL_CERT_FILE
    try:
        with (
            httpx.Client(trust_env=False, follow_redirects=False, timeout=limit_s, verify=safe) as client,
            client.stream(
                "POST", url.copy_with(host=where), content=body, headers=sent, extensions={"sni_hostname": url.host}
            ) as reply,
        ):
            status = reply.status_code
    except httpx.HTTPError as error:
        raise Temporary(one_line(error, 120)) from None
    if status == 429 or status >= 500:
        raise Temporary(f"it answered {status}")
    if 300 <= status < 400:
        raise UserError(f"it answered {status}; redirects are not followed: name the new address in promote.notify")
    if status >= 400:
        raise UserError(f"it answered {status}")


def checked_address(host: str, port: int) -> str:
    """One address of a host. Raises UserError for a private one unless the host's name itself says that it is private,
    Temporary when the name is not known."""
    try:
        found = [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError) as error:
        raise Temporary(f"the name is not known ({one_line(error, 80)})") from None
    plain = [address.partition("%")[0] for address in found]
    if not named_private(host) and (private := [address for address in plain if not ip_address(address).is_global]):
        raise UserError(
            f"the name points to the private address {private[0]}; name that address itself in the settings to allow it"
        )
    return found[0]


def host_of(address: str) -> str:
    """What of an address may be logged: its path can hold a secret."""
    return urlsplit(address).hostname or "?"
