"""benchmarks.served against a real HTTP server: equal answers, others, and an engine that misbehaves."""

import contextlib
import http.server
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import served
from listopd_jax.data.tokenizer import train_tokenizer
from listopd_jax.models import hf
from listopd_jax.models.config import ModelConfig
from listopd_jax.models.decoder import abstract


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny export with a chat template."""
    root = tmp_path_factory.mktemp("served")
    tokenizer = train_tokenizer(served.messages(4), 400, root / "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}assistant:"
    config, rng = ModelConfig(len(tokenizer), 32, 48, 2, 4, 2, 8), np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape, scale=0.2), "float32"), abstract(config)[1]
    )
    hf.save_hf(root / "model", config, params, tokenizer, ends=[tokenizer.eos_token_id])
    return root / "model"


@contextlib.contextmanager
def answering(reply):
    """The URL of a server whose answer to each request is `reply(body)`: (status, text)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            status, text = reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def chat(text):
    return 200, json.dumps({"choices": [{"message": {"content": text}}]})


def test_equal_answers_are_counted_and_the_first_other_one_is_shown(folder, tmp_path, capsys):
    asked = served.messages(3)
    right = dict(zip(asked, served.ours(folder, asked, 5), strict=True))

    def reply(body):
        assert body["temperature"] == 0 and body["max_tokens"] == 5 and body["model"] == str(folder)
        message = body["messages"][0]["content"]
        return chat("else" if message == asked[1] else right[message])

    with answering(reply) as url:
        flags = [
            f"--weights={folder}",
            f"--url={url}",
            "--prompts=3",
            "--tokens=5",
            f"--out={tmp_path / 'o.json'}",
        ]
        assert served.main(flags) == 1
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["same"] == 2 and found["first_difference"] == {"ours": right[asked[1]], "theirs": "else"}


@pytest.mark.parametrize(
    ("reply", "says"),
    [((500, "no memory"), "500 no memory"), ((200, "<html>"), "no answer"), ((404, "{}"), "404")],
)
def test_an_engine_that_fails_is_one_line(reply, says):
    with answering(lambda _: reply) as url, pytest.raises(served.UserError, match=says):
        served.theirs(url, "model", "hello", 5)


def test_an_engine_that_does_not_start_is_one_line():
    with pytest.raises(served.UserError, match="ended with exit code 1"), served.engine("false"):
        pass
    with pytest.raises(served.UserError, match="cannot be run"), served.engine("no-such-engine"):
        pass
