"""Fetches an image from a caller's URL, and never from an address of this machine or of its private network.

Every redirect is checked again: scheme, port, host list, and all addresses that the host name resolves to. The
connection goes to the address that was checked, so that DNS rebinding has no effect. Knows nothing of image formats.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, urljoin, urlsplit

from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from api.errors import ServingError, invalid, too_large
from settings import Settings

MAX_REDIRECTS = 3
MAX_URL = 4096
PORTS = frozenset({80, 443})
_FORBIDDEN_CHARACTERS = re.compile(r"[\x00-\x20\x7f\\<>\"{}|^`]")
_CHUNK = 64 * 1024
_RESOLUTIONS = threading.BoundedSemaphore(32)  # at a time: one that hangs keeps its thread until the resolver gives up
# IPv6 networks that embed an IPv4 address, which may be a private one.
_TUNNELS = tuple(ipaddress.ip_network(n) for n in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))


def is_public(address: str) -> bool:
    """Whether an IP address is public. IPv4-mapped ones are judged by the IPv4 address; tunnels are never public."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if any(parsed in network for network in _TUNNELS):
            return False
    return parsed.is_global and not (parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified)


@dataclass(frozen=True)
class Fetcher:
    """Thread-safe. `hosts`: if not empty, the only ones allowed. Only tests set `public`, `ports` and `authorities`."""

    enabled: bool
    hosts: frozenset[str]
    timeout_s: float
    max_bytes: int
    public: Callable[[str], bool] = is_public
    ports: frozenset[int] = PORTS
    authorities: str | None = None  # file of trusted certificates; None: the system's

    @classmethod
    def of(cls, settings: Settings) -> Fetcher:
        hosts = frozenset(host.strip().rstrip(".").lower() for host in settings.fetch_hosts.split(",") if host.strip())
        return cls(settings.fetch_images, hosts, settings.fetch_timeout_s, settings.max_image_bytes)

    def fetch(self, url: str, param: str) -> bytes:
        """The bytes at `url`. Blocks up to `timeout_s`. Raises the 400 or 413 error that names `param` and the reason."""
        if not self.enabled:
            raise _refused(param, "remote pictures are not fetched here (GLM_FETCH_IMAGES); send a data: URL")
        deadline = time.monotonic() + self.timeout_s
        for _ in range(MAX_REDIRECTS + 1):
            location, data = self._hop(url, param, deadline)
            if location is None:
                return data
            url = _redirected(url, location, param)
        raise _refused(param, f"more than {MAX_REDIRECTS} redirects")

    def _hop(self, url: str, param: str, deadline: float) -> tuple[str | None, bytes]:
        """One request: the URL it redirects to, or the bytes."""
        parts, port = self._checked(url, param)
        host = parts.hostname or ""
        connection = self._connection(parts.scheme, host, self._address(host, port, param, deadline), port, deadline)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        headers = {"Host": parts.netloc, "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "glm-web"}
        timer = threading.Timer(max(deadline - time.monotonic(), 0), _shut_down, [connection])
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", path, headers=headers, preload_content=False, decode_content=False)
            return self._read(connection.getresponse(), param, deadline)
        except (HTTPError, HTTPException, OSError, ValueError) as error:
            if time.monotonic() >= deadline - 0.01:
                raise self._too_slow(param) from None
            raise _refused(param, f"it cannot be fetched ({type(error).__name__})") from None
        finally:
            timer.cancel()
            connection.close()

    def _read(self, response: Any, param: str, deadline: float) -> tuple[str | None, bytes]:
        if response.status in (301, 302, 303, 307, 308):
            location = response.headers.get("Location")
            if not location:
                raise _refused(param, f"the server answered {response.status} without a Location header")
            return location, b""
        if response.status != 200:
            raise _refused(param, f"the server answered {response.status}")
        announced = response.headers.get("Content-Length", "")
        if announced.isdigit() and int(announced) > self.max_bytes:
            raise self._too_large(param, announced)
        data = bytearray()
        while piece := response.read1(_CHUNK):
            data += piece
            if len(data) > self.max_bytes:
                raise self._too_large(param, f"{len(data)} or more")
            if time.monotonic() > deadline:
                raise self._too_slow(param)
        if time.monotonic() > deadline or (announced.isdigit() and len(data) < int(announced)):
            raise _refused(param, "the response was cut off")
        return None, bytes(data)

    def _checked(self, url: str, param: str) -> tuple[SplitResult, int]:
        """The parts and port of a URL that every parser reads the same way. Raises the 400 error."""
        if len(url) > MAX_URL:
            raise invalid(f"`{param}` must have <= {MAX_URL} characters. Given: {len(url)}", param, "unsupported_url")
        if _FORBIDDEN_CHARACTERS.search(url) or not url.isascii():
            raise _refused(param, "it contains characters that are not allowed in a URL")
        try:
            parts = urlsplit(url)
            port = parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            raise _refused(param, "it is not a valid URL") from None
        if parts.scheme not in ("http", "https"):
            raise _refused(param, f"its scheme must be http, https or data. Given: {parts.scheme[:20]!r}")
        if not parts.hostname or "@" in parts.netloc or "%" in parts.netloc:
            raise _refused(param, "it must have a host name and no user name")
        if port not in self.ports:
            raise _refused(param, f"its port must be one of {sorted(self.ports)}. Given: {port}")
        if self.hosts and parts.hostname.rstrip(".").lower() not in self.hosts:
            raise _refused(param, "its host is not one of those allowed (GLM_FETCH_HOSTS)")
        return parts, port

    def _address(self, host: str, port: int, param: str, deadline: float) -> str:
        try:
            resolved = _resolve(host, port, deadline)
        except TimeoutError:
            raise self._too_slow(param) from None
        except (OSError, UnicodeError):
            raise _refused(param, "its host name cannot be resolved") from None
        addresses = [str(entry[4][0]) for entry in resolved]
        # All of them: a private address may hide among public ones.
        if not addresses or not all(self.public(address) for address in addresses):
            raise _refused(param, "its host has an address that is not public")
        return addresses[0]

    def _connection(self, scheme: str, host: str, address: str, port: int, deadline: float) -> HTTPConnection:
        limit_s = max(deadline - time.monotonic(), 0.01)
        if scheme == "http":
            return HTTPConnection(address, port, timeout=limit_s)
        name = host.rstrip(".")
        return HTTPSConnection(
            address, port, timeout=limit_s, server_hostname=name, assert_hostname=name,
            cert_reqs="CERT_REQUIRED", ca_certs=self.authorities,
        )  # fmt: skip

    def _too_large(self, param: str, given: str) -> ServingError:
        return too_large(f"`{param}` must be <= {self.max_bytes} bytes. Given: {given}", param, "image_too_large")

    def _too_slow(self, param: str) -> ServingError:
        return _refused(param, f"it did not arrive within {self.timeout_s:g} s")


def _resolve(host: str, port: int, deadline: float) -> list[Any]:
    """`getaddrinfo`, which has no time limit of its own. Raises TimeoutError at the deadline, OSError, UnicodeError."""
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            results.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except Exception as error:  # raised again in the caller's thread
            results.put(error)
        finally:
            _RESOLUTIONS.release()

    if not _RESOLUTIONS.acquire(timeout=max(deadline - time.monotonic(), 0)):
        raise TimeoutError
    try:
        threading.Thread(target=resolve, name="resolve", daemon=True).start()
    except RuntimeError as error:  # no more threads
        _RESOLUTIONS.release()
        raise OSError(str(error)) from None
    try:
        result = results.get(timeout=max(deadline - time.monotonic(), 0))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(result, Exception):
        raise result
    return list(result)


def _shut_down(connection: HTTPConnection) -> None:
    """End a transfer at its deadline: the timeout of a single read never expires while bytes keep trickling in."""
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)


def _redirected(url: str, location: str, param: str) -> str:
    try:
        target = urljoin(url, location)
    except ValueError:
        raise _refused(param, "it redirects to something that is not a valid URL") from None
    scheme = target.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise _refused(param, f"a link may redirect to http or https only, and this one redirects to {scheme[:20]!r}")
    return target


def _refused(param: str, reason: str) -> ServingError:
    return invalid(f"`{param}`: {reason}.", param, "unsupported_url")
