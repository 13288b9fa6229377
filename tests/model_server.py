"""A real HTTP server on loopback that serves a model of ours as vLLM does, and misbehaves where it is told to."""

import collections
import contextlib
import http.server
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 96  # tokens that a row has room for


class ModelServer(http.server.ThreadingHTTPServer):
    """Serves `graph` and `params`, under the name 'teacher'.

    `faults`: what the next requests to /v1/completions get instead, in order; `asked`: (path, headers, body) of all
    requests. `noise`: nats by which every answer is off, at random. `no_tokenize`: whether /tokenize is missing.
    """

    daemon_threads = True

    def __init__(self, graph, params, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.faults, self.asked = tokenizer, collections.deque(), []
        self.noise, self.no_tokenize, self.lock = 0.0, False, threading.Lock()
        self.rng = np.random.default_rng(0)

        @jax.jit
        def score(row, length):
            decoder = nnx.merge(graph, params)
            logits = decoder(row[None], length[None]) @ decoder.head_weight().T
            return jax.nn.log_softmax(logits[0, :, : len(tokenizer)].astype(jnp.float32))

        self.score = score

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def prompt_logprobs(self, ids):
        """As vLLM gives them: null, then of each token itself and the likeliest, by id."""
        logp = np.asarray(self.score(jnp.asarray(ids + [0] * (WIDTH - len(ids))), jnp.int32(len(ids))))
        found = [None]
        for before, token in zip(logp, ids[1:], strict=False):
            off = self.noise * self.rng.random()
            entry = {str(i): {"logprob": float(before[i]) - off} for i in (int(before.argmax()), token)}
            found.append(entry)
        return found


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; whatever is wrong with it is a 400."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers), None))
        known = {"data": [{"id": "teacher"}]} if self.path == "/v1/models" else None
        self.send(200 if known else 404, json.dumps(known))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((self.path, dict(self.headers), body))
            faults = self.server.faults if self.path == "/v1/completions" else ()
            fault = faults.popleft() if faults else None
        if self.path == "/tokenize" and not self.server.no_tokenize:
            ids = self.server.tokenizer.encode(body["prompt"], add_special_tokens=body["add_special_tokens"])
            self.send(200, json.dumps({"tokens": ids}))
        elif self.path != "/v1/completions":
            self.send(404, '{"detail": "Not Found"}')
        elif body.get("echo"):
            self.send(
                200, json.dumps({"choices": [{"text": self.server.tokenizer.decode(body["prompt"]) + " x"}]})
            )
        else:
            self.answer(body, fault)

    def answer(self, body, fault):
        rows = body["prompt"]
        if max(map(len, rows)) > WIDTH:
            return self.send(400, '{"error": {"message": "longer than the maximum model length"}}')
        with self.server.lock:
            scores = [self.server.prompt_logprobs(row) for row in rows]
        if fault == "short":
            scores[0].pop()
        if fault in ("nan", "positive", "text"):
            scores[0][1][str(rows[0][1])] = {
                "logprob": {"nan": float("nan"), "positive": 3.0, "text": "a"}[fault]
            }
        choices = [{"index": i, "text": "x", "prompt_logprobs": s} for i, s in enumerate(scores)][::-1]
        text = json.dumps({"choices": choices[1:] if fault == "fewer" else choices})
        if isinstance(fault, int):
            return self.send(fault, f'{{"error": "as told, {self.headers["Authorization"]}"}}')
        if fault == "hang":
            time.sleep(2)
        if fault == "flood":
            return self.send(200, "[" + "{}," * (1 << 24) + "0]")
        self.send(
            200,
            {"truncated": text[:-20], "deep": "[" * 200_000, "list": "[]"}.get(fault, text),
            fault == "cut",
        )

    def send(self, status, text, cut=False):
        data = text.encode()
        with contextlib.suppress(OSError):  # who has stopped waiting
            self.send_response(status)
            if status == 429:
                self.send_header("Retry-After", "0")
            if status == 302:
                self.send_header("Location", f"{self.server.url}/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)


@contextlib.contextmanager
def serving(graph, params, tokenizer):
    """A server that runs while inside."""
    with ModelServer(graph, params, tokenizer) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
