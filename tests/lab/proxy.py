"""The way out: an HTTP proxy that lets the hosts reach the package mirrors and nothing else.

Packages and indexes that came through once are kept: they never change under the same address.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import shutil
import socket
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Collection
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO, cast
from urllib.parse import SplitResult, unquote, urlsplit

import urllib3

from .access import Access, AccessLog

_CHUNK = 65536
_TIMEOUT_SECONDS = 120
_PORTS = {"http": 80, "https": 443}
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


@dataclass(frozen=True)
class Destination:
    """Where a request is to go."""

    host: str
    port: int


def parse_target(method: str, target: str) -> Destination | None:
    """Return where a request to a proxy is to go; None if it doesn't say."""
    try:
        if method == "CONNECT":
            parts = urlsplit(f"//{target}")
            if parts.path or parts.port is None:
                return None
            port = parts.port
        else:
            parts = urlsplit(target)
            if parts.scheme != "http":
                return None
            port = parts.port or _PORTS["http"]
    except ValueError:
        return None
    if not parts.hostname or parts.username is not None:
        return None
    return Destination(parts.hostname, port)


@dataclass(frozen=True)
class Policy:
    """Who may go where."""

    subnet: str
    """Clients' addresses begin with this."""
    hosts: Path
    """A file of host names, a line each, reached on the ports of HTTP and HTTPS."""
    servers: Collection[Destination]
    """Reached on exactly this port: the lab's own servers."""

    def allows(self, destination: Destination) -> bool:
        """Whether a host of the lab may go there."""
        if destination in self.servers:
            return True
        if destination.port not in _PORTS.values() or not self.hosts.exists():
            return False
        return destination.host in self.hosts.read_text().split()


def is_immutable(url: str) -> bool:
    """Whether what is at this address will never change: a package, or an index by its hash."""
    path = urlsplit(url).path
    return ("/pool/" in path and path.endswith(".deb")) or "/by-hash/" in path


def upstream_proxy(destination: Destination, scheme: str) -> str | None:
    """Return the proxy that this machine itself uses to get there."""
    if urllib.request.proxy_bypass(destination.host):
        return None
    return urllib.request.getproxies().get(scheme)


class Proxy(ThreadingHTTPServer):
    """The proxy, listening on one address."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, address: tuple[str, int], policy: Policy, log: AccessLog, packages: Path
    ) -> None:
        super().__init__(address, _Handler)
        self.policy = policy
        self.log = log
        self.packages = packages
        self._pools: dict[str | None, urllib3.PoolManager] = {}
        self._pools_lock = threading.Lock()

    def pool(self, proxy: str | None) -> urllib3.PoolManager:
        """Return the connections to the outside, by the proxy that they go through."""
        with self._pools_lock:
            if proxy not in self._pools:
                manager = partial(urllib3.ProxyManager, proxy) if proxy else urllib3.PoolManager
                self._pools[proxy] = manager(maxsize=16, timeout=_TIMEOUT_SECONDS, retries=False)
            return self._pools[proxy]

    def upstream(self, destination: Destination, scheme: str) -> str | None:
        """Return the proxy through which to go there; the lab's own servers are next door."""
        own = destination in self.policy.servers
        return None if own else upstream_proxy(destination, scheme)

    def verify_request(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> bool:
        """Turn away who is not in the lab, since other networks can reach the bridge too."""
        del request
        address = cast("tuple[str, int]", client_address)[0]
        return address.startswith(self.policy.subnet)


@dataclass(frozen=True)
class Outcome:
    """What was sent in answer to a request."""

    status: int
    sent: int
    note: str = ""
    is_whole: bool = False
    """Whether it was all of a good answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = _TIMEOUT_SECONDS
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (as in the base)
        """Say nothing: there is a log of our own."""

    def _serve(self, answer: Callable[[Destination], Outcome]) -> None:
        """Answer a request, if it may be, and write down what came of it."""
        serial = self.server.log.begin()
        outcome = Outcome(499, 0, "the client went away")
        try:
            destination = parse_target(self.command, self.path)
            if destination is None:
                outcome = self._refuse(400, "Not a request to a proxy")
            elif not self.server.policy.allows(destination):
                outcome = self._refuse(403, "Not a destination of the lab")
            else:
                outcome = answer(destination)
        except OSError:
            self.close_connection = True
        finally:
            access = Access(
                server="proxy",
                client=self.client_address[0],
                method=self.command,
                target=self.path,
                status=outcome.status,
                bytes=outcome.sent,
                range=self.headers.get("Range", ""),
                note=outcome.note,
            )
            self.server.log.end(serial, access)

    def _refuse(self, status: int, reason: str) -> Outcome:
        self.close_connection = True
        self.send_response(status, reason)
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()
        return Outcome(status, 0, reason)

    # Requests that the proxy makes on behalf of the host

    def do_GET(self) -> None:
        self._serve(self._answer)

    def do_HEAD(self) -> None:
        self._serve(self._answer)

    def do_POST(self) -> None:
        self._serve(self._answer)

    def _answer(self, destination: Destination) -> Outcome:
        if "Transfer-Encoding" in self.headers:
            return self._refuse(411, "Length Required")
        if self.command != "GET" or "Range" in self.headers or not is_immutable(self.path):
            return self._forward(destination)
        kept = self.server.packages / hashlib.sha256(self.path.encode()).hexdigest()
        if kept.exists():
            return self._send_kept(kept)
        with tempfile.NamedTemporaryFile(dir=self.server.packages, delete=False) as copy:
            outcome = self._forward(destination, cast("BinaryIO", copy))
        if outcome.is_whole:
            Path(copy.name).rename(kept)
        else:
            Path(copy.name).unlink()
        return outcome

    def _forward(self, destination: Destination, copy: BinaryIO | None = None) -> Outcome:
        """Pass the request on, and the answer back, and also into the copy."""
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in _HOP_BY_HOP and name.lower() != "content-length"
        }
        length = int(self.headers.get("Content-Length") or 0)
        try:
            response = self.server.pool(self.server.upstream(destination, "http")).request(
                self.command,
                self.path,
                headers=headers,
                body=self.rfile.read(length) if length else None,
                preload_content=False,
                decode_content=False,
                redirect=False,
            )
        except urllib3.exceptions.HTTPError as error:
            return self._refuse(502, f"Bad Gateway ({type(error).__name__})")
        with closing(response):
            return self._pass_back(response, copy)

    def _pass_back(self, response: urllib3.BaseHTTPResponse, copy: BinaryIO | None) -> Outcome:
        sent = 0
        try:
            self._send_head(response)
            while chunk := response.read1(_CHUNK, decode_content=False):
                self._send_chunk(response, chunk)
                sent += len(chunk)
                if copy is not None:
                    copy.write(chunk)
            self._send_chunk(response, b"")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            # What was cut upstream is cut here: the host is not to take it for the whole.
            self.close_connection = True
            return Outcome(response.status, sent, f"cut: {type(error).__name__}")
        is_whole = response.status == 200 and response.headers.get("Content-Length") == str(sent)
        return Outcome(response.status, sent, is_whole=is_whole)

    def _send_head(self, response: urllib3.BaseHTTPResponse) -> None:
        self.send_response_only(response.status, response.reason)
        for name, value in response.headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if self._chunked(response):
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunked(self, response: urllib3.BaseHTTPResponse) -> bool:
        has_body = self.command != "HEAD" and response.status not in (204, 304)
        return has_body and "Content-Length" not in response.headers

    def _send_chunk(self, response: urllib3.BaseHTTPResponse, chunk: bytes) -> None:
        if self._chunked(response):
            chunk = b"%x\r\n%s\r\n" % (len(chunk), chunk)
        self.wfile.write(chunk)

    def _send_kept(self, kept: Path) -> Outcome:
        with kept.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            self.send_response_only(200)
            self.send_header("Content-Type", "application/vnd.debian.binary-package")
            self.send_header("Content-Length", str(length))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile, _CHUNK)
        return Outcome(200, length, "cached")

    # Tunnels, in which the host speaks for itself

    def do_CONNECT(self) -> None:
        self._serve(self._tunnel)

    def _tunnel(self, destination: Destination) -> Outcome:
        self.close_connection = True
        try:
            outside = _connect(destination, self.server.upstream(destination, "https"))
        except OSError as error:
            return self._refuse(502, f"Bad Gateway ({type(error).__name__})")
        with outside:
            self.send_response_only(200, "Connection established")
            self.end_headers()
            return Outcome(200, _relay(self.connection, outside))


def _connect(destination: Destination, proxy: str | None) -> socket.socket:
    if proxy is None:
        address = (destination.host, destination.port)
        return socket.create_connection(address, timeout=_TIMEOUT_SECONDS)
    parts = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    connection = HTTPConnection(
        parts.hostname or "", parts.port or _PORTS["http"], timeout=_TIMEOUT_SECONDS
    )
    connection.set_tunnel(destination.host, destination.port, _credentials(parts))
    connection.connect()
    return cast("socket.socket", connection.sock)


def _credentials(parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return dict(urllib3.make_headers(proxy_basic_auth=user))


def _relay(inside: socket.socket, outside: socket.socket) -> int:
    """Pass bytes both ways until either side closes or both are silent; return how many."""
    passed = 0
    other = {inside: outside, outside: inside}
    with selectors.DefaultSelector() as selector:
        for side in other:
            selector.register(side, selectors.EVENT_READ)
        while ready := selector.select(_TIMEOUT_SECONDS):
            for key, _ in ready:
                side = cast("socket.socket", key.fileobj)
                try:
                    data = side.recv(_CHUNK)
                    other[side].sendall(data)
                except OSError:
                    return passed
                if not data:
                    return passed
                passed += len(data)
    return passed
