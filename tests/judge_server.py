"""A judge on loopback that speaks the protocols of OpenAI and Google, and misbehaves as it is told."""

import contextlib
import gzip
import http.server
import json
import socket
import struct
import threading
import time
from collections import Counter

BOMB = gzip.compress(bytes(1 << 26))  # 64 kB, of 64 MiB


class JudgeServer(http.server.ThreadingHTTPServer):
    """Answers what `script(text, attempt)` says of the user's message: a number, or the name of a misbehaviour.

    `asked` counts requests by text, `paid` those that got a whole reply.
    """

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.lock, self.asked, self.paid = script, threading.Lock(), Counter(), Counter()
        self.bodies, self.headers = [], []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that has left is no news."""


@contextlib.contextmanager
def serving(script):
    """A JudgeServer at work."""
    with JudgeServer(script) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def reply(path, text, refused=False):
    """A whole reply in the protocol of `path`."""
    if path.endswith("/chat/completions"):
        message = {"role": "assistant", "content": None if refused else text}
        message |= {"refusal": "I would rather not."} if refused else {}
        usage = {"prompt_tokens": 100, "completion_tokens": 7}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": usage}
    if refused:
        return {"promptFeedback": {"blockReason": "SAFETY"}}
    content = {"role": "model", "parts": [{"text": text}]}
    usage = {"promptTokenCount": 100, "candidatesTokenCount": 4, "thoughtsTokenCount": 3}
    return {"candidates": [{"content": content, "finishReason": "STOP"}], "usageMetadata": usage}


def user_text(path, body):
    """The user's message in a request."""
    if path.endswith("/chat/completions"):
        return body["messages"][-1]["content"]
    return body["contents"][0]["parts"][0]["text"]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_POST(self):  # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = user_text(self.path, body)
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append({k.lower(): v for k, v in self.headers.items()})
            self.server.asked[text] += 1
            attempt = self.server.asked[text]
        self._answer(text, self.server.script(text, attempt))

    def _answer(self, text, what):
        if not isinstance(what, str):
            what = json.dumps({"score": what})
        kind, _, rest = what.partition(" ")
        if misbehave := getattr(self, f"_{kind}", None) if kind.isidentifier() else None:
            misbehave(rest)
            return
        self._send(200, json.dumps(reply(self.path, what)))
        with self.server.lock:
            self.server.paid[text] += 1

    def _send(self, status, body, promised=None, **headers):
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(promised or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _status(self, rest):
        """status CODE [MESSAGE]"""
        code, _, message = rest.partition(" ")
        self._send(int(code), json.dumps({"error": {"code": int(code), "message": message or "no"}}))

    def _slowly(self, rest):
        """429 that says how long to wait: OpenAI's in a header, Google's in the body."""
        if self.path.endswith("/chat/completions"):
            self._send(429, "slow down", Retry_After=rest)
            return
        info = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{rest}s"}
        self._send(429, json.dumps({"error": {"code": 429, "message": "slow down", "details": [info]}}))

    def _slow(self, rest):
        """A reply after `rest` seconds."""
        time.sleep(float(rest))
        self._send(200, json.dumps(reply(self.path, '{"score": 1}')))

    def _drip(self, rest):
        """A byte at a time, without end."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        for _ in range(200):
            self.wfile.write(b" ")
            time.sleep(0.05)

    def _refuse(self, rest):
        self._send(200, json.dumps(reply(self.path, "", refused=True)))

    def _truncate(self, rest):
        """Half of the JSON, as a whole body."""
        whole = json.dumps(reply(self.path, '{"score": 1}'))
        self._send(200, whole[: len(whole) // 2])

    def _cut(self, rest):
        """The connection ends in the middle of a body."""
        self._send(200, '{"choices": [', promised=1000)
        self._drop(rest)

    def _drop(self, rest):
        """The connection is reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def _bomb(self, rest):
        """A small body that unpacks to a large one."""
        self._send(200, BOMB, Content_Encoding="gzip")

    def _flood(self, rest):
        """A large body, part by part."""
        part = b" " * (1 << 16)
        self._send(200, part, promised=1 << 26)
        for _ in range((1 << 10) - 1):
            self.wfile.write(part)

    def _body(self, rest):
        """A body of whatever JSON."""
        self._send(200, rest)

    def _away(self, rest):
        """A redirect, which must not be followed: it would hand on the key."""
        self._send(302, "", Location=f"{self.server.url}/elsewhere")
