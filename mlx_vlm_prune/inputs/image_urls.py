"""An image or a video from a URL: from public addresses alone, within limits of size and time.

A host's name is resolved once for each hop, all its addresses are checked, and the connection goes
to one of these: a name that changes its address in between reaches nothing else. Proxies, cookies
and passwords are not used.
"""

import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from importlib import import_module
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Thread
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from ..checkpoints.errors import UserError, reason
from ..checkpoints.version import __version__
from .image_sources import URL_LETTERS, NamedBytes, url_name

logger = logging.getLogger("mlx_vlm_prune")
SECONDS = 30.0  # a download may take, with all its redirects
CONNECT_SECONDS = 5.0  # of these for one address of a host; the next may answer
QUIET_SECONDS = 2.0  # before a note says what is waited for
MAX_BYTES = 50_000_000  # a photograph of 25 megapixels as PNG
MOST_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
HEADERS = {"User-Agent": f"mlx_vlm_prune/{__version__}", "Accept": "image/*, video/*"}
NAT64 = ip_network("64:ff9b::/96")  # an IPv4 address in its last 32 bits
UNICAST = ip_network("2000::/3")  # all public addresses of IPv6

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], list[str]]


def is_public(address: Address) -> bool:
    """Is it an address on the internet, and none of this machine, its network or a group?"""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in NAT64:
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address not in UNICAST or address.sixtofour is not None:
            return False
    return address.is_global and not address.is_multicast


def addresses_of(host: str, port: int) -> list[str]:
    """What the system's resolver answers. Raises OSError."""
    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in entries))


def download(
    url: str,
    is_allowed: Callable[[Address], bool] | None = None,
    resolve: Resolve = addresses_of,
    seconds: float = SECONDS,
) -> NamedBytes:
    """The bytes behind an http or https URL.

    `is_allowed` judges each address (default: `is_public`). Raises UserError, one sentence that
    names the URL without its query: another scheme, an address that is not allowed, a status other
    than 200, more than MAX_BYTES or MOST_REDIRECTS, or more than `seconds`.
    """
    run = _Download(url, is_allowed or is_public, resolve, seconds)
    run.start()
    try:
        run.join(min(QUIET_SECONDS, seconds))
        if run.is_alive():
            logger.info("downloading %s", run.name)
            run.join(max(0.0, seconds - QUIET_SECONDS))
        if run.is_alive():
            raise UserError(f"{run.name} took more than the {seconds:g} seconds allowed")
    finally:
        run.stop()
    if isinstance(run.problem, UserError):
        raise run.problem
    if run.problem:
        text = "".join(c if c.isprintable() else "?" for c in reason(run.problem)[:100])
        raise UserError(f"cannot download {run.name}: {text}") from run.problem
    return NamedBytes(run.content, run.name)


class _Download(Thread):
    """A thread of its own, since nothing else ends a resolver or a server that sends a byte now
    and then. It answers with `content` or `problem`."""

    def __init__(
        self, url: str, is_allowed: Callable[[Address], bool], resolve: Resolve, seconds: float
    ):
        super().__init__(name=url_name(url), daemon=True)
        self.url, self.is_allowed, self.resolve, self.seconds = url, is_allowed, resolve, seconds
        self.content = b""
        self.problem: Exception | None = None
        self.is_stopped = False
        self._socket: socket.socket | None = None

    def run(self) -> None:
        try:
            self.content = self._follow(self.url)
        except Exception as problem:  # of resolvers, sockets, TLS and HTTP
            self.problem = problem

    def stop(self) -> None:
        """End what the thread waits for, if it still waits."""
        self.is_stopped = True
        if self._socket:
            with suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
            if not self.is_alive():
                self._socket.close()

    def _follow(self, url: str) -> bytes:
        """The body behind a URL and its redirects, each of which is checked as the first."""
        for _ in range(1 + MOST_REDIRECTS):
            parts = _checked_parts(url)
            with closing(self._connection(parts)) as connection:
                path = quote(parts.path or "/", safe=URL_LETTERS)
                query = f"?{quote(parts.query, safe=URL_LETTERS)}" if parts.query else ""
                connection.request("GET", path + query, headers=HEADERS)
                response = connection.getresponse()
                target = response.headers.get("Location")
                if response.status in REDIRECTS and target:
                    url = urljoin(url, target)
                    continue
                if response.status != 200:
                    raise UserError(f"{self.name} answers with status {response.status}")
                return self._body(response)
        raise UserError(f"{self.name} redirects more than {MOST_REDIRECTS} times")

    def _body(self, response: HTTPResponse) -> bytes:
        too_large = UserError(f"{self.name} has more than the {MAX_BYTES // 10**6} MB allowed")
        if (response.length or 0) > MAX_BYTES:
            raise too_large
        content = response.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise too_large
        if response.length:  # what was announced and did not come
            raise UserError(f"{self.name} ended {response.length} bytes too early")
        return content

    def _connection(self, parts: SplitResult) -> HTTPConnection:
        """A connection to an address that was checked."""
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        connected = self._connect(host, port)
        if parts.scheme == "http":
            connection = HTTPConnection(host, port)
        else:
            context = tls_context()
            connection = HTTPSConnection(host, port, context=context)
            encrypted = context.wrap_socket(
                connected, server_hostname=host, do_handshake_on_connect=False
            )
            self._socket = connected = encrypted  # which has taken over the other's descriptor
            encrypted.do_handshake()
        connection.sock = connected
        return connection

    def _connect(self, host: str, port: int) -> socket.socket:
        addresses = self.resolve(host, port)
        for address in addresses:
            if not self.is_allowed(ip_address(address)):
                raise UserError(
                    f"{self.name} leads to {address}, which is not a public address; download the"
                    " file and give its path"
                )
        problem: OSError = OSError("its name has no address")
        seconds = min(CONNECT_SECONDS, self.seconds / max(len(addresses), 1))
        for address in addresses:
            if self.is_stopped:
                break
            try:
                self._socket = socket.create_connection((address, port), seconds)
                self._socket.settimeout(self.seconds)
                return self._socket
            except OSError as e:
                problem = e
        raise problem


def tls_context() -> ssl.SSLContext:
    """Trusts the system's certificates; where there are none, as in Python from python.org on
    macOS, those of certifi, which comes with huggingface_hub."""
    context, paths = ssl.create_default_context(), ssl.get_default_verify_paths()
    if not (paths.cafile or paths.capath):
        with suppress(ImportError):
            context.load_verify_locations(import_module("certifi").where())
    return context


def _checked_parts(url: str) -> SplitResult:
    """A URL's parts. Raises UserError for what is not downloaded."""
    name = url_name(url)
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_complete = False
    if not is_complete or parts.scheme not in PORTS:
        raise UserError(f"{name} is no http or https URL with a host")
    if parts.username is not None or parts.password is not None:
        raise UserError(f"{name} holds a user name or a password; leave them out")
    return parts
