"""The server of the page: for the browser of this machine alone.

It listens on the loopback address. Its address has a random token, without which nothing is found. A request is refused
whose header Host is not this server, so that no name of another site leads here, or which the page of another site
makes. The page loads nothing from elsewhere; its policy (CSP) forbids the browser to. The server has the files of one
result and of the page, by name, and no others, and it changes none.

The page keeps one connection open. The server ends when the last page is closed.
"""

import json
import secrets
import sys
import threading
import time
import webbrowser
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.view import niivue
from drivenmorph_jax.view.layers import Shown

LOOPBACK = "127.0.0.1"
GRACE = 5.0  # seconds without a page after which the server ends; a page that is loaded again takes less
BEAT = 1.0  # seconds between signs of life on the open connection
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
                               "img-src 'self' data: blob:; connect-src 'self' data:; font-src 'self' data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
PAGE = {"": ("page.html", "text/html; charset=utf-8"), "page.css": ("page.css", "text/css; charset=utf-8"),
        "page.js": ("page.js", "text/javascript; charset=utf-8")}


class Server(ThreadingHTTPServer):
    """The server of one result. `address` is where its page is."""

    daemon_threads = True

    def __init__(self, shown: Shown, port: int = 0):
        self.shown, self.token = shown, secrets.token_urlsafe(24)
        self._pages, self._seen, self._lock = 0, None, threading.Lock()
        self._made = cache(self._make)
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise InputError(f"port {port} cannot be used ({error.strerror}): give another --port, or none") from error
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}
        self.address = f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    def handle_error(self, request, client_address):
        """A browser may end a connection before it has all: NiiVue does so when it has seen the first bytes."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def content(self, name):
        """(bytes, type) of a name below the token, or None."""
        if name in PAGE:
            file, kind = PAGE[name]
            return (resources.files("drivenmorph_jax.view") / file).read_bytes(), kind
        layer = name.removesuffix(".nii")
        known = name in ("niivue.js", "result.json") or name != layer and layer in self.shown.images | self.shown.maps
        return self._made(name) if known else None

    def _make(self, name):
        if name == "niivue.js":
            return niivue.module().encode(), "text/javascript; charset=utf-8"
        if name == "result.json":
            return json.dumps(self.shown.described()).encode(), "application/json"
        return self.shown.file(name.removesuffix(".nii")), "application/octet-stream"

    def page_opened(self):
        with self._lock:
            self._pages += 1

    def page_closed(self):
        with self._lock:
            self._pages, self._seen = self._pages - 1, time.monotonic()

    def service_actions(self):
        """Called twice a second: ends the server when no page is left."""
        with self._lock:
            left = not self._pages and self._seen is not None and time.monotonic() - self._seen > GRACE
        if left:
            threading.Thread(target=self.shutdown).start()  # which waits for this loop


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server

    def do_GET(self):
        parts = self.path.split("/")
        token, name = parts[1:] if len(parts) == 3 else ("", "")
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host not in self.server.hosts or origin not in (None, f"http://{host}") or self.headers.get(
                "Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return self._answer(403, b"refused\n", "text/plain")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return self._answer(404, b"not found\n", "text/plain")
        if name == "alive":
            return self._stay()
        found = self.server.content(name)
        if found is None:
            return self._answer(404, b"not found\n", "text/plain")
        return self._answer(200, *found)

    def _answer(self, status, body, kind):
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stay(self):
        """A stream of events that ends when the page is closed."""
        self.send_response(200)
        for name, value in {**HEADERS, "Content-Type": "text/event-stream"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.server.page_opened()
        try:
            while True:
                self.wfile.write(b": alive\n\n")
                self.wfile.flush()
                time.sleep(BEAT)
        except OSError:
            self.close_connection = True
        finally:
            self.server.page_closed()

    def log_message(self, *_):
        """Say nothing: the address with its token belongs into no log."""


def view(folder, port=0, browser=True):
    """Show the page of a result folder until it is closed, or until Ctrl-C.

    Raises InputError where the folder holds no result, NiiVue is missing, or the port is in use.
    """
    niivue.module()  # refused at once
    with Server(Shown(folder), port) as server:
        print(f"{folder} is shown at {server.address}\nIt ends when the page is closed, or by Ctrl-C.", flush=True)
        if browser:
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
        else:
            print("the page was closed")
