"""Margins at structural tokens, against distributions read one by one."""

import numpy as np
from flax import nnx
from test_expected import distributions, setting  # noqa: F401 (a fixture)

from listopd_jax.stages.margins import structural_margins
from listopd_jax.task.prompt import render_answer


def test_they_are_the_gaps_between_the_two_likeliest_tokens(setting):  # noqa: F811
    (decoder, _), codec, batch = setting
    batch = batch | {"weight": np.array([1, 1, 1, 0], np.float32)}
    texts = {0: render_answer((7, 10)), 1: "nothing", 2: render_answer((1, 0, 3))}
    written = {
        i: [*codec.tokenizer.encode(text, add_special_tokens=False), codec.eos] for i, text in texts.items()
    }
    found = structural_margins(*nnx.split(decoder), [batch], written, codec, chunk=16)

    slow = []
    for prompt, length, index, weight in zip(*batch.values(), strict=True):
        answer = written[int(index)]
        logp = np.sort(distributions(decoder, prompt[:length], answer), -1)
        counted = codec.structural(np.array([answer]), np.array([len(answer)]))[0]
        slow += (logp[counted, -1] - logp[counted, -2]).tolist() * int(weight)
    assert len(slow) > 20 and np.ptp(slow) > 1
    np.testing.assert_allclose(found, slow, atol=1e-4)
