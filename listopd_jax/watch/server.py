"""The server of the page: loopback only, read-only, four fixed files and the reports of workdirs that were found.

No path of a request is ever joined to a folder: names are looked up among what was found. Pages load nothing from
elsewhere, by their Content-Security-Policy; a report is shown in a sandbox, since a workdir's files may be anybody's.
"""

import importlib.resources
import json
import pathlib
import re
import urllib.parse
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from listopd_jax.errors import UserError
from listopd_jax.report import script
from listopd_jax.watch.state import page_state
from listopd_jax.watch.workdirs import REPORT, own_file, workdirs

HOST = "127.0.0.1"
NAMES = {"localhost", HOST, "[::1]"}
"""Names by which a browser may reach this machine: a foreign name that resolves here (DNS rebinding) is refused."""
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/watch.css": ("watch.css", "text/css; charset=utf-8"),
    "/watch.js": ("watch.js", "text/javascript; charset=utf-8"),
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
REPORT_POLICY = f"sandbox allow-scripts; {script.POLICY}; frame-ancestors 'none'"


class Server(ThreadingHTTPServer):
    """Watches `root` at 127.0.0.1:`port` (0: a free one); UserError if the port is taken."""

    daemon_threads = True

    def __init__(self, root: pathlib.Path, port: int):
        self.root = root
        try:
            super().__init__((HOST, port), Handler)
        except OSError as e:
            raise UserError(f"--port={port}: {e.strerror or e}; give another, 0 takes a free one") from e

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_address[1]}/"


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD; http.server answers every other method with an error."""

    server: Server
    server_version, sys_version = "listopd_jax", ""

    def do_GET(self) -> None:
        """The page, its files, its state, or a report."""
        if re.sub(r":[0-9]+\Z", "", self.headers.get("Host", "")) not in NAMES:
            return self._refuse(HTTPStatus.FORBIDDEN)
        url = urllib.parse.urlsplit(self.path)
        chosen = urllib.parse.parse_qs(url.query).get("workdir", [""])[0]
        if url.path in FILES:
            name, kind = FILES[url.path]
            return self._send((importlib.resources.files(__package__) / name).read_bytes(), kind)
        if url.path == "/state.json":
            return self._send(json.dumps(page_state(self.server.root, chosen)).encode(), "application/json")
        if url.path == "/report":
            return self._report(chosen)
        return self._refuse(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def _report(self, name: str) -> None:
        folder = workdirs(self.server.root).get(name)
        try:
            found = folder is not None and own_file(self.server.root, folder / REPORT)
        except UserError:
            found = False
        if not found:
            return self._refuse(HTTPStatus.NOT_FOUND)
        self._send((folder / REPORT).read_bytes(), "text/html; charset=utf-8", REPORT_POLICY)

    def _send(self, body: bytes, kind: str, policy: str = POLICY, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: HTTPStatus) -> None:
        self._send(f"{status.value} {status.phrase}\n".encode(), "text/plain; charset=utf-8", status=status)

    def log_message(self, *_: object) -> None:
        """Print nothing: a page that refreshes would fill the terminal."""
