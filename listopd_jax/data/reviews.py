"""The one record that every reader yields, and the text cleaning that all of them share."""

import dataclasses
import hashlib
import html
import re

from listopd_jax.task.prompt import one_line

_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
# Digits are bounded because int() refuses thousands of them, and html.unescape raises what it raises.
_ENTITY = re.compile(r"&(?:#[0-9]{1,20}|#[xX][0-9a-fA-F]{1,20}|[A-Za-z][A-Za-z0-9]*);")
_UNESCAPES = 8


@dataclasses.dataclass(frozen=True, slots=True)
class Review:
    """One review as read: text cleaned but not cut; title and category of the product, '' if unknown; helpful votes."""

    user: str
    product: str
    title: str
    text: str
    votes: int
    category: str = ""

    @property
    def key(self) -> str:
        """Stable name of the review, the key of a labels file.

        The first 16 hex digits of the SHA-1 of product, user and cleaned text (UTF-8) joined by NUL: it
        depends on nothing but the review itself, not on its row, the other rows or any setting.
        """
        return hashlib.sha1("\0".join((self.product, self.user, self.text)).encode()).hexdigest()[:16]


def clean_text(text: str) -> str:
    """HTML unescaped, `<br />` and control characters to spaces, whitespace runs to one space.

    Entities are unescaped up to 8 times, since real reviews hold even `&amp;amp;amp;amp;#39;`. Without its semicolon
    one is left alone: in the address `?a=1&copy=2` it is none.
    `<|` becomes `< |`: the keys of existing labels files depend on it. What keeps control tokens out of a prompt is
    data/control.py, which knows the tokenizer.
    """
    for _ in range(_UNESCAPES if "&" in text else 0):
        text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
    return one_line(_BREAK.sub(" ", text)).replace("<|", "< |")


def first_words(text: str, count: int) -> str:
    """The first `count` words of a cleaned text; all of them if `count` is 0."""
    return " ".join(text.split(" ", count)[:count]) if count else text


def hash64(*parts: str) -> int:
    """64-bit hash of some strings: two million of them collide with probability 1e-7, in 8 bytes each."""
    return int.from_bytes(hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest(), "little")
