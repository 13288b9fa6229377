"""JSON Schemas as masks over tokens, by llguidance: what may follow in an answer if the schema is to hold.

Answers are compact JSON, the form that SFT trains on, with the properties of an object in the order of its schema.
What a schema leaves no choice about is spelt in the tokenizer's own tokens for it.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt32
from transformers import PreTrainedTokenizerBase

from listopd_jax.errors import UserError, one_line
from listopd_jax.rounding import ceil_div

_OFF = "or leave 'schema' out of evaluation.constrained and opd.constrained_rollouts"
_COMPACT = {"whitespace_flexible": False}


class Schema(NamedTuple):
    """A JSON Schema and whose it is, for messages."""

    schema: Any
    where: str


class SchemaMasks:
    """Compiles schemas over the ids of one tokenizer, each once; the ids `ends` close an answer.

    UserError if llguidance is not installed or cannot read the tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab: int, ends: Sequence[int]):
        try:
            import llguidance
            import llguidance.hf
            import llguidance.numpy
        except ImportError as e:
            raise UserError(
                "constrained decoding by a schema needs llguidance; pip install 'listopd_jax[constrained]', "
                + _OFF
            ) from e
        try:
            read = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab, eos_token=list(ends))
        except ValueError as e:
            raise UserError(
                f"llguidance cannot read the tokenizer {tokenizer.name_or_path} ({one_line(e)}); take another, {_OFF}"
            ) from e
        self._llguidance, self._tokenizer, self._words = llguidance, read, ceil_div(vocab, 32)
        self._executor, self._compiled = llguidance.LLExecutor(), {}

    def compile(self, given: Schema) -> Any:
        """The llguidance.LLMatcher of an answer not begun; UserError for a schema that llguidance cannot hold."""
        text = json.dumps(given.schema)
        if text not in self._compiled:
            matcher = self._llguidance.LLMatcher
            made = matcher(
                self._tokenizer, matcher.grammar_from_json_schema(text, overrides=_COMPACT), log_level=0
            )
            if made.is_error():
                why = made.get_error().splitlines()[0][:160]
                raise UserError(
                    f"{given.where}: llguidance cannot constrain to this schema ({why}); change it, {_OFF}"
                )
            self._compiled[text] = made
        # A matcher moves on with its answer; the one that is kept must stay at the start.
        return self._compiled[text].deep_copy()

    def keeps(self, given: Schema, tokens: Sequence[int]) -> bool:
        """Whether an answer of these tokens, its end left out, is let through."""
        matcher = self.compile(given)
        return matcher.consume_tokens(list(tokens)) and matcher.is_accepting()

    def rows(self, schemas: Sequence[Schema]) -> Callable:
        """rollout.decode.Masks of rows, row i with schemas[i]. A row that llguidance gives up may only end."""
        matchers = [self.compile(schema) for schema in schemas]

        def masks(
            rows: Int[np.ndarray, " R"], last: Int[np.ndarray, " R"] | None
        ) -> UInt32[np.ndarray, "R W"]:
            asked = [matchers[row] for row in rows.tolist()]
            if last is not None:
                self._executor.consume_token_par(list(zip(asked, last.tolist(), strict=True)))
            bits = np.zeros((len(asked), self._words), np.int32)
            places = [(matcher, i) for i, matcher in enumerate(asked)]
            self._llguidance.numpy.fill_next_token_bitmask_par(self._executor, places, bits)
            # llguidance fills int32. The device shifts the words right, which must not copy a sign.
            return bits.view(np.uint32)

        return masks
