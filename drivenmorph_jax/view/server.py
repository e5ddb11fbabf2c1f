"""The server of the page: for the browser of this machine alone.

It listens on the loopback address. Its address has a random token, without which nothing is found. A request is refused
whose header Host is not this server, so that no name of another site leads here, or which the page of another site
makes. The page loads nothing from elsewhere; its policy (CSP) forbids the browser to. The server has the files of one
result or one cohort and of the page, by name, and no others. What a page asks to be done is JSON of a limited length.

A page keeps one connection open, on which it hears what has changed. The server ends when the last page is closed.
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
from pathlib import Path

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.files import SUMMARY
from drivenmorph_jax.registration.pairs import TABLE
from drivenmorph_jax.view import niivue
from drivenmorph_jax.view.cohort import CohortPage
from drivenmorph_jax.view.steering import ResultPage

LOOPBACK = "127.0.0.1"
GRACE = 5.0  # seconds without a page after which the server ends; a page that is loaded again takes less
BEAT = 1.0  # seconds between signs of life on the open connection
LONGEST = 2**24  # bytes of what a page asks for: landmarks, and a compressed mask
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
                               "img-src 'self' data: blob:; connect-src 'self' data:; font-src 'self' data:; "
                               "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
JSON = "application/json"
SCRIPT, STYLE, HTML = (f"text/{kind}; charset=utf-8" for kind in ("javascript", "css", "html"))
SCRIPTS = "page", "panels", "marks", "steer", "program", "table", "decide", "cohort"
PARTS = {"page.css": STYLE} | {f"{name}.js": SCRIPT for name in SCRIPTS}


class Server(ThreadingHTTPServer):
    """The server of a page. `address` is where it is."""

    daemon_threads = True
    ended = False

    def __init__(self, page, port: int = 0):
        self.page, self.token = page, secrets.token_urlsafe(24)
        self._pages, self._seen, self._lock = 0, None, threading.Lock()
        try:
            super().__init__((LOOPBACK, port), Handler)
        except OSError as error:
            raise InputError(f"port {port} cannot be used ({error.strerror}): give another --port, or none") from error
        self.hosts = {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}
        self.address = f"http://{LOOPBACK}:{self.server_port}/{self.token}/"

    def server_close(self):
        self.ended = True  # which the open connections look at
        super().server_close()

    def handle_error(self, request, client_address):
        """A browser may end a connection before it has all."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def content(self, page, name):
        """(bytes, type) of a name of a page, or None."""
        if name == "":
            return part(page.html), HTML
        if name in PARTS:
            return part(name), PARTS[name]
        if name == "niivue.js":
            return script(), SCRIPT
        return page.content(name)

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
        self._answered(self._get)

    def do_POST(self):
        self._answered(self._post)

    def _answered(self, act):
        """Answer what the function says: a status, bytes and a type; unless it has answered, which is None."""
        try:
            found = self._refused() or act(*self._place())
        except InputError as error:
            found = 409, json.dumps({"error": str(error)}).encode(), JSON
        if found is not None:
            self._answer(*found)

    def _refused(self):
        """What is answered to the page of another site."""
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        if host not in self.server.hosts or origin not in (None, f"http://{host}") or self.headers.get(
                "Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            return 403, b"refused\n"

    def _place(self):
        """(the page that is asked for, or None; the name below it)."""
        _, token, *numbers, name = self.path.split("/") if self.path.count("/") > 1 else ("", "", "")
        page = self.server.page if secrets.compare_digest(token.encode(), self.server.token.encode()) else None
        for number in numbers:
            page = page and page.page(number)
        return page, name

    def _get(self, page, name):
        if page is not None and name == "alive":
            return self._stay(page)
        return (200, *found) if (found := page and self.server.content(page, name)) else (404,)

    def _post(self, page, name):
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= LONGEST:
                return 413, b"too long\n"
            content = json.loads(self.rfile.read(length))
        except (TypeError, ValueError):
            content = None
        if not isinstance(content, dict) or self.headers.get("Content-Type") != JSON:
            return 400, b"not understood\n"
        found = page and page.act(name, content)
        return (404,) if found is None else (200, json.dumps(found).encode(), JSON)

    def _answer(self, status, body=b"not found\n", kind="text/plain"):
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _stay(self, page):
        """A stream of what the page is told. It ends when the page is closed."""
        self.send_response(200)
        for name, value in {**HEADERS, "Content-Type": "text/event-stream"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.server.page_opened()
        page.begin()
        seen = None
        try:
            while not self.server.ended:
                number, content = page.news.wait(seen, BEAT)
                text = ": alive" if number == seen else f"data: {json.dumps(content)}"
                seen = number
                self.wfile.write(f"{text}\n\n".encode())
                self.wfile.flush()
        except OSError:
            pass  # the page was closed
        finally:
            self.close_connection = True
            self.server.page_closed()

    def log_message(self, *_):
        """Say nothing: the address with its token belongs into no log."""


def part(name):
    """The bytes of a file of the page."""
    return (resources.files("drivenmorph_jax.view") / name).read_bytes()


@cache
def script():
    """The bytes of NiiVue."""
    return niivue.module().encode()


def opened(folder):
    """The page of the result or the cohort in a folder. Raises InputError where it holds neither."""
    if (Path(folder) / TABLE).is_file() and not (Path(folder) / SUMMARY).is_file():
        return CohortPage(folder)
    return ResultPage(folder)


def view(folder, port=0, browser=True):
    """Show the page of the folder of a result or of a cohort until it is closed, or until Ctrl-C.

    Raises InputError where the folder holds neither, NiiVue is missing, or the port is in use.
    """
    script()  # refused at once
    page = opened(folder)
    with Server(page, port) as server:
        threading.Thread(target=page.prepare, daemon=True).start()
        print(f"{folder} is shown at {server.address}\nIt ends when the page is closed, or by Ctrl-C.", flush=True)
        if browser:
            threading.Thread(target=webbrowser.open, args=(server.address,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended")
        else:
            print("the page was closed")
