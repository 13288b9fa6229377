"""Tokenizers: load one, train a small one for the embedded data, and insist that two are the same."""

import os
import pathlib
from collections.abc import Iterable

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from listopd_jax import files
from listopd_jax.data import manifest
from listopd_jax.errors import UserError, one_line

EOS, PAD = "<|im_end|>", "<|endoftext|>"

# The pieces of Qwen's pre-tokeniser: a word with one sign or space before it, single digits, a run of signs
# with one space before it, white space. On our JSON: `[{"` `review` `_id` `":"` `r` `1` `","` … `}]`.
_PIECES = r"(?: |[^\s\p{L}\p{N}])?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
_PROBE = (
    'Below are 8 reviews.\n[Review 1] id=r1 It\'s très 5\'8", <b>naïve</b>\n[{"review_id":"r1","score":10}]'
)


def load_tokenizer(path: str | os.PathLike) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in a local folder or of a hub id, with an EOS, and a PAD (EOS if it defines none).

    A hub id that the manifest lists is loaded at its pinned revision.

    Raises:
      UserError: not found, not reachable (offline), not a tokenizer, or without an EOS token.
    """
    revision = "main" if pathlib.Path(path).exists() else manifest.revision(os.fspath(path))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(path), revision=revision)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as e:
        raise UserError(
            f"{path}: no tokenizer can be loaded from this folder or hub id ({one_line(e)[:200]})"
        ) from e
    except Exception as e:
        # The Rust parser reports a damaged tokenizer.json as a bare Exception.
        if type(e) is not Exception:
            raise
        raise UserError(f"{path}: tokenizer.json is damaged ({e}); fetch it again") from e
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: this tokenizer defines no EOS token, without which no answer can end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, folder: str | os.PathLike
) -> transformers.PreTrainedTokenizerBase:
    """Train a byte-level BPE on `texts`, save it to `folder` (replaced) as a fast tokenizer, and load it.

    Text is NFC-normalised and split as Qwen's is, so any text round-trips and structure has the same token
    boundaries. The vocabulary has at most `vocab_size` entries, 256 of them bytes and 2 the special tokens
    EOS and PAD. The result depends on the texts alone. Raises UserError if `vocab_size` is below 258 or
    `folder` cannot be written.
    """
    if vocab_size < 258:
        raise UserError(
            f"tokenizer vocabulary of {vocab_size}: at least 258 are needed (256 bytes, EOS, PAD)"
        )
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_PIECES), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    try:
        with files.whole_folder(folder) as new:
            fast.save_pretrained(new)
    except OSError as e:
        raise files.not_written(folder, e) from e
    return load_tokenizer(folder)


def check_tokenizers_agree(
    student: transformers.PreTrainedTokenizerBase, teacher: transformers.PreTrainedTokenizerBase
) -> None:
    """Raise UserError unless both give the same ids to the same text, end alike and format a chat alike.

    Distillation compares the two models' probabilities of the same ids, so any difference makes it
    meaningless.
    """
    a, b = student.get_vocab(), teacher.get_vocab()
    if a != b:
        unlike = sum(b.get(token) != i for token, i in a.items()) + len(b.keys() - a.keys())
        raise UserError(
            f"student and teacher have different vocabularies ({len(a)} and {len(b)} entries, "
            f"{unlike} unlike); choose models of one family"
        )
    if student(_PROBE)["input_ids"] != teacher(_PROBE)["input_ids"]:
        raise UserError(
            "student and teacher split the same text into different tokens; choose models of one family"
        )
    for name in ("eos_token_id", "chat_template"):
        if getattr(student, name) != getattr(teacher, name):
            raise UserError(
                f"student and teacher tokenizers differ in {name}; give both the same tokenizer folder"
            )
