"""Tokenizers: load one and see that it can do the task, train a small one for the embedded data."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

import huggingface_hub
import tokenizers
import transformers
from absl import logging
from tokenizers import decoders, models, pre_tokenizers, trainers

from listopd_jax import files
from listopd_jax.data import manifest
from listopd_jax.errors import UserError, is_panic, one_line
from listopd_jax.task.contract import strict_parse
from listopd_jax.task.prompt import render_answer, review_ids

EOS, PAD = "<|im_end|>", "<|endoftext|>"

# The pieces of Qwen's pre-tokeniser: a word with one sign or space before it, single digits, a run of signs
# with one space before it, white space. On our JSON: `[{"` `review` `_id` `":"` `r` `1` `","` … `}]`.
_PIECES = r"(?: |[^\s\p{L}\p{N}])?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
_PROBE = (
    "Below are 8 reviews.\n[Review 1] id=r1 It's très 5'8\", <b>naïve</b>  $12.50 \tcafe\u0301 帽子 🧢 OK!!\n\n"
    '[{"review_id":"r1","score":10}]'
)
_VOCABULARIES = (
    "tokenizer.json tokenizer.model vocab.json vocab.txt spiece.model sentencepiece.bpe.model".split()
)
"""Files that hold a tokenizer's tokens; from a folder without any, transformers makes a tokenizer of one token."""

_KEPT_APART = (
    "merges.txt tokenizer_config.json special_tokens_map.json added_tokens.json chat_template.jinja".split()
)
_OF_VERSION_5 = ("backend", "is_local", "local_files_only")  # how it was loaded, not what it is


def load_tokenizer(path: str | os.PathLike) -> transformers.PreTrainedTokenizerBase:
    """`read_tokenizer`, and what a run needs of it: a known EOS, a PAD (EOS if it defines none), answers it can spell.

    Raises UserError if it cannot be read, defines no EOS or one that its vocabulary lacks, or if the right answer does
    not come back from its ids.
    """
    tokenizer = read_tokenizer(path)
    with _one_line(path):
        _check_eos(tokenizer, path)
        _check_answer(tokenizer, path)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(path: str | os.PathLike) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer in a local folder or of a hub id, which gives the ids that its tokenizer.json gives.

    A hub id that the manifest lists is loaded at its pinned revision. transformers rebuilds some classes by rules of
    its own: where these give other ids than the file, the file is read as it is, and that is said.

    Raises UserError: not found, not reachable (offline), not a tokenizer, or one that does not know where its tokens
    are in a text.
    """
    if pathlib.Path(path).is_dir() and not has_tokenizer(path):
        raise UserError(
            f"{path}: holds no tokenizer (no {_VOCABULARIES[0]}); set tokenizer.path to one that does, e.g. that of "
            "the model that these weights were made from"
        )
    with _one_line(path):
        tokenizer, file = _load(transformers.AutoTokenizer, path), _file(path)
        if file is not None and not _matches_file(tokenizer, file):
            logging.warning("%s: %s gives other ids; used as it is", file, type(tokenizer).__name__)
            tokenizer = _load(transformers.PreTrainedTokenizerFast, path)
            if not _matches_file(tokenizer, file):
                raise UserError(
                    f"{file}: transformers gives other ids than this file; fetch tokenizer.json and "
                    "tokenizer_config.json again, both of one model"
                )
    if not tokenizer.is_fast:
        raise UserError(f"{path}: holds no tokenizer.json, and none can be made of it; add the model's")
    return tokenizer


def has_tokenizer(folder: str | os.PathLike) -> bool:
    """Whether a local folder holds a tokenizer; the folder of a checkpoint need not."""
    return any((pathlib.Path(folder) / name).exists() for name in _VOCABULARIES)


def tokenizer_files(path: str | os.PathLike) -> list[pathlib.Path]:
    """The files, sorted, that make the tokenizer of a local folder or a hub id that was loaded before."""
    found = (_file(path, name) for name in (*_VOCABULARIES, *_KEPT_APART))
    return sorted(file for file in found if file is not None)


def _revision(path: str | os.PathLike) -> str:
    return "main" if pathlib.Path(path).exists() else manifest.revision(os.fspath(path))


def _load(kind: type, path: str | os.PathLike) -> transformers.PreTrainedTokenizerBase:
    return kind.from_pretrained(os.fspath(path), revision=_revision(path))


@contextlib.contextmanager
def _one_line(path: str | os.PathLike) -> Iterator[None]:
    """Turn whatever transformers and its Rust raise for damaged files of a tokenizer into a UserError.

    They check little: a value of a wrong type raises any exception, an empty token a Rust panic, which is no Exception.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as e:
        if not _of_a_file(e):
            raise
        if broken := _broken_file(path):
            raise UserError(f"{broken}: is damaged; fetch it again") from e
        raise UserError(
            f"{path}: no tokenizer can be loaded from this folder or hub id ({one_line(e)[:200]}); download its "
            "tokenizer files again"
        ) from e


def _broken_file(path: str | os.PathLike) -> pathlib.Path | None:
    """The first file of a tokenizer in a local folder that cannot be read as what its name says."""
    for file in tokenizer_files(path) if pathlib.Path(path).is_dir() else ():
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            if file.name == "tokenizer.json":
                tokenizers.Tokenizer.from_file(str(file))
        except BaseException as e:
            if not _of_a_file(e):
                raise
            return file
    return None


def _of_a_file(e: BaseException) -> bool:
    """Whether a damaged file may raise it: any Exception, and a panic of Rust."""
    return isinstance(e, Exception) or is_panic(e)


def _file(path: str | os.PathLike, name: str = "tokenizer.json") -> pathlib.Path | None:
    """A file of a tokenizer that was loaded from a folder or hub id; None if it has none of that name."""
    if pathlib.Path(path).is_dir():
        file = pathlib.Path(path) / name
        return file if file.is_file() else None
    cached = huggingface_hub.try_to_load_from_cache(os.fspath(path), name, revision=_revision(path))
    return pathlib.Path(cached) if isinstance(cached, str) else None


def _matches_file(tokenizer: transformers.PreTrainedTokenizerBase, file: pathlib.Path) -> bool:
    """Whether its tokens have the ids of its tokenizer.json, and text is split as that says."""
    stored = tokenizers.Tokenizer.from_file(str(file))
    # tokenizer.json may have kept the truncation and padding of whoever saved it.
    stored.no_truncation()
    stored.no_padding()
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    # A subset: tokenizer_config.json may add tokens.
    same_ids = stored.get_vocab().items() <= tokenizer.get_vocab().items()
    return same_ids and ids == stored.encode(_PROBE, add_special_tokens=False).ids


def _check_eos(tokenizer: transformers.PreTrainedTokenizerBase, path: str | os.PathLike) -> None:
    """UserError without an EOS, or with one that transformers had to make an id for: no model has learnt it."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{path}: this tokenizer defines no EOS token, without which no answer can end; set eos_token in "
            "tokenizer_config.json"
        )
    known = tokenizer.init_kwargs.get("added_tokens_decoder") or {}
    file = _file(path)
    if file is None or tokenizer.eos_token_id in known:
        return
    if tokenizers.Tokenizer.from_file(str(file)).token_to_id(tokenizer.eos_token) is None:
        raise UserError(
            f"{path}: tokenizer_config.json says eos_token {tokenizer.eos_token!r}, which tokenizer.json lacks; name "
            "the token that ends the model's turns"
        )


def _check_answer(tokenizer: transformers.PreTrainedTokenizerBase, path: str | os.PathLike) -> None:
    """UserError unless the right answer comes back from its ids: SFT would train on what the contract fails."""
    scores = tuple(range(11))
    ids = tokenizer(render_answer(scores), add_special_tokens=False)["input_ids"]
    # Cleaning up would drop spaces before punctuation: not what the ids spell.
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if strict_parse(text, review_ids(len(scores))).value != scores:
        raise UserError(
            f"{path}: this tokenizer cannot spell the answers: the right one comes back from its ids as "
            f"{' '.join(text.split())[:60]!r}; use a model whose vocabulary has {{, }}, [, ] and digits"
        )


def save_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, folder: str | os.PathLike) -> None:
    """Write a tokenizer to `folder` in the terms that transformers 4 and 5, and vLLM, all read."""
    # versions before 4.52 know no chat_template.jinja
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = pathlib.Path(folder) / "tokenizer_config.json"
    config = {name: value for name, value in files.read_json(path).items() if name not in _OF_VERSION_5}
    # transformers 5's name for it, which version 4 does not know.
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    files.write_json(path, config)


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
    # The text is split already; ByteLevel's own regex is GPT-2's.
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        # Sorted, because alphabet() has another order in every process.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    try:
        with files.atomic_folder(folder) as new:
            save_tokenizer(fast, new)
    except OSError as e:
        raise files.not_written(folder, e) from e
    return load_tokenizer(folder)


def check_tokenizers_agree(
    ours: transformers.PreTrainedTokenizerBase, theirs: transformers.PreTrainedTokenizerBase
) -> None:
    """Raise UserError unless a model's own tokenizer (`theirs`) gives the same ids to the same text as `ours`.

    Distillation compares the two models' probabilities of the same ids, so any difference makes it meaningless. EOS
    and chat template may differ, as those of a base model and its instruct model do: `ours` decides. So may tokens
    that only one of them has, such as a [PAD] that was added.
    """
    a, b = ours.get_vocab(), theirs.get_vocab()
    token_of = {i: token for token, i in b.items()}
    if unlike := sum(b.get(token, i) != i or token_of.get(i, token) != token for token, i in a.items()):
        raise UserError(
            f"{theirs.name_or_path}: has another vocabulary than tokenizer.path={ours.name_or_path} ({len(b)} and "
            f"{len(a)} entries, {unlike} unlike); choose models of one family"
        )
    if (
        ours(_PROBE, add_special_tokens=False)["input_ids"]
        != theirs(_PROBE, add_special_tokens=False)["input_ids"]
    ):
        raise UserError(
            f"{theirs.name_or_path}: splits the same text into other tokens than tokenizer.path={ours.name_or_path}; "
            "choose models of one family"
        )
