"""Pictures that are named by an address: got from hosts that the settings name, and from public addresses alone.

A name is resolved once, every address that it has must be public, and the connection goes to the very address that was
checked; each redirect is checked like the first address. Nothing is sent but the request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from facemllm.serve.language import Refused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_REDIRECTS = 3
_MAX_CHARS = 2000
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_PORTS = {"http": 80, "https": 443}


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(one[4][0]) for one in found]


def is_public(address: Address) -> bool:
    """Whether an address belongs to the public internet, also where it holds another one inside."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
        if address in _NAT64:
            inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if not all(is_public(one) for one in inner if one is not None):
            return False
        if address.ipv4_mapped is not None:
            return True
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to the address that was checked."""

    def __init__(self, resolve: Resolve, allowed: Callable[[Address], bool]) -> None:
        self._resolve, self._allowed, self._inner = resolve, allowed, httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check and connect. Raises Refused."""
        try:
            found = [ipaddress.ip_address(one.partition("%")[0]) for one in await self._resolve(host, port)]
        except (OSError, ValueError):
            found = []
        if not found:
            raise Refused(422, f"{host} has no address")
        if not all(self._allowed(one) for one in found):
            raise Refused(422, f"{host} leads to an address that is not public; nothing is fetched from there")
        return await self._inner.connect_tcp(str(found[0]), port, timeout, None, socket_options)


class Fetcher:
    """Gets pictures from `hosts` (names as in an address, with `:port` where it is not the usual one).

    At most `max_bytes` within `seconds`, redirects included. `resolve` and `allowed` say which addresses a host has,
    and which of them may be connected to.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        max_bytes: int,
        seconds: float,
        resolve: Resolve = resolve,
        allowed: Callable[[Address], bool] = is_public,
    ) -> None:
        self._hosts = frozenset(host.lower() for host in hosts)
        self._max_bytes, self._seconds = max_bytes, seconds
        self._backend = _Checked(resolve, allowed)

    async def get(self, url: str, where: str) -> bytes:
        """The bytes of a picture. Raises Refused, whose line begins with `where`."""
        try:
            async with (
                asyncio.timeout(self._seconds),
                httpcore.AsyncConnectionPool(network_backend=self._backend) as pool,
            ):
                for _ in range(1 + MAX_REDIRECTS):
                    self._check(url)
                    found = await self._once(pool, url)
                    if isinstance(found, bytes):
                        return found
                    url = urljoin(url, found)
            raise Refused(422, f"more than {MAX_REDIRECTS} redirects")
        except Refused as refused:
            raise Refused(refused.status, f"{where} cannot be fetched: {refused.reason}") from None
        except TimeoutError:
            raise Refused(422, f"{where} was not fetched within {self._seconds:g} s") from None
        except Exception as error:  # a hostile server can raise almost anything from a client
            raise Refused(422, f"{where} cannot be fetched: {type(error).__name__}") from None

    def _check(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise Refused(422, "this is no address") from None
        plain = url.isascii() and url.isprintable() and " " not in url and "\\" not in url and len(url) <= _MAX_CHARS
        if parts.scheme not in _PORTS or not parts.hostname or not plain or "@" in parts.netloc:
            raise Refused(422, "only plain https and http addresses are fetched")
        named = parts.hostname if port in (None, _PORTS[parts.scheme]) else f"{parts.hostname}:{port}"
        if named.lower() not in self._hosts:
            raise Refused(403, f"images are not fetched from {named[:100]}")

    async def _once(self, pool: httpcore.AsyncConnectionPool, url: str) -> bytes | str:
        """The picture at an address, or the address that it redirects to."""
        headers = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", "facemllm")]
        async with pool.stream(
            "GET", url.partition("#")[0], headers=[("Host", urlsplit(url).netloc), *headers]
        ) as reply:
            said = {name.lower(): value.decode("latin-1") for name, value in reply.headers}
            if reply.status in (301, 302, 303, 307, 308) and b"location" in said:
                return said[b"location"]
            if reply.status != 200:
                raise Refused(422, f"its server answers {reply.status}")
            if not said.get(b"content-type", "").lower().startswith("image/"):
                raise Refused(422, "its server does not call it an image")
            if said.get(b"content-encoding", "identity").lower() != "identity":
                raise Refused(422, "its server sends it compressed")
            data = bytearray()
            async for piece in reply.aiter_stream():
                data += piece
                if len(data) > self._max_bytes:
                    raise Refused(413, f"it has more than {self._max_bytes:,} bytes")
            return bytes(data)
