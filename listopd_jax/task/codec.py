"""Between token ids and the text that the contract judges."""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from listopd_jax.task.contract import STRUCTURAL, TOKEN_CLASSES, token_classes
from listopd_jax.task.grammar import Automaton, contract_automaton

# Stands for a token other than an end that decodes to nothing, such as an id that no token has.
NO_TEXT = "\ufffd"
IS_STRUCTURAL = np.array([name in STRUCTURAL for name in TOKEN_CLASSES])


def vocab_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id of a tokenizer and one more; ids may have holes."""
    # len(tokenizer) counts tokens, and would be too small where ids have holes.
    return max(tokenizer.get_vocab().values()) + 1


class Codec:
    """A tokenizer with what decoding needs: `vocab`, the text of each token, and the ids `eos`, `ends` and `pad`.

    Any of `ends` closes a completion; `eos`, one of them, closes the answers of SFT. `also_end` are those of the
    models, in addition to the tokenizer's. `classify` is the task's `token_classes`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        also_end: Collection[int] = (),
        classify: Callable[[Sequence[str]], list[int]] = token_classes,
    ):
        self.tokenizer, self._classify = tokenizer, classify
        self.vocab = vocab_of(tokenizer)
        self.eos = tokenizer.eos_token_id
        self.ends = tuple(sorted({self.eos, *also_end}))
        self.pad = tokenizer.pad_token_id
        # "" is what token_classes takes for the end
        self._pieces = [
            "" if i in self.ends else tokenizer.decode([i], clean_up_tokenization_spaces=False) or NO_TEXT
            for i in range(self.vocab)
        ]

    def automaton(self, k: int, compact: bool = False) -> Automaton:
        """The contract of lists of `k` reviews over the ids of this tokenizer; `compact`: without white space."""
        blank = lambda piece: compact and any(map(str.isspace, piece))  # noqa: E731
        pieces = [NO_TEXT if blank(piece) else piece for piece in self._pieces]
        return contract_automaton(pieces, self.ends, k)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of one completion, its closing EOS (one of `ends`) left out; other special tokens stay visible."""
        tokens = list(tokens)
        tokens = tokens[:-1] if tokens and tokens[-1] in self.ends else tokens
        return self.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def texts(self, tokens: Int[np.ndarray, "*s T"], lengths: Int[np.ndarray, "*s"]) -> list[str]:
        """The texts of a batch of completions, flattened."""
        rows = zip(tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1), strict=True)
        return [self.text(row[:n].tolist()) for row, n in rows]

    def ended(
        self, tokens: Int[np.ndarray, "*s T"], lengths: Int[np.ndarray, "*s"]
    ) -> Bool[np.ndarray, "*s"]:
        """Whether each completion closes with one of `ends`; one that does not was cut off by its budget."""
        last = np.take_along_axis(tokens, np.maximum(lengths - 1, 0)[..., None], axis=-1)[..., 0]
        return (lengths > 0) & np.isin(last, self.ends)

    def classes(
        self, tokens: Int[np.ndarray, "N T"], lengths: Int[np.ndarray, " N"]
    ) -> Int[np.ndarray, "N T"]:
        """Index into TOKEN_CLASSES of each completion token; −1 after the end."""
        out = np.full(tokens.shape, -1)
        for row, (ids, n) in enumerate(zip(tokens, lengths, strict=True)):
            out[row, :n] = self._classify([self._pieces[i] for i in ids[:n].tolist()])
        return out

    def structural(
        self, tokens: Int[np.ndarray, "N T"], lengths: Int[np.ndarray, " N"]
    ) -> Bool[np.ndarray, "N T"]:
        """True at tokens that the contract dictates (everything but score digits and stray text)."""
        classes = self.classes(tokens, lengths)
        # −1 would read the last class; the first factor keeps it out.
        return (classes >= 0) & IS_STRUCTURAL[classes]
