"""Control tokens spelt out in a text: reviews are hostile, and no review may end a turn or open one."""

import transformers

from listopd_jax.task.prompt import render_answer


def control_ids(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    """The ids that mark a turn or a thought: special tokens, and added ones with signs in them, such as `<think>`.

    Added words, runs of white space, the unknown token, and tokens that the right answers are spelt with count as text.
    """
    # ▁ is how SentencePiece writes a space.
    added = {i: (t.content.replace("▁", " "), t.special) for i, t in tokenizer.added_tokens_decoder.items()}
    signs = {i for i, (text, _) in added.items() if not text.replace(" ", "").isalnum()}
    answer = set(tokenizer(render_answer(range(11)), add_special_tokens=False)["input_ids"])
    special = {i for i, (_, special) in added.items() if special} | set(tokenizer.all_special_ids)
    blank = {i for i, (text, _) in added.items() if not text.strip()}
    marks = special | (signs - answer)
    # EOS is put back: in GPT-2's tokenizer it is the unknown token, too.
    return (marks - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}) - blank


def spell_out(text: str, tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """`text` with a space put into whatever the tokenizer would read as a control token: `</s>` becomes `< /s>`.

    The tokenizer says where one is, so that a normaliser cannot bring one back.
    """
    control, separated = control_ids(tokenizer), False
    while spans := _spans(text, tokenizer, control):
        # From the end, so that the offsets of earlier spans stay right.
        for start, end in reversed(spans):
            text = text[:start] + _broken(text[start:end], separated) + text[end:]
        # Where a token is still found, a normaliser took the space out again: the next round blanks it.
        separated = True
    return text


def _spans(text: str, tokenizer, control: set[int]) -> list[tuple[int, int]]:
    """Where control tokens are in `text`, and `<unk>` spelt out."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [
        (start, end)
        for i, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if i in control or (i == tokenizer.unk_token_id and text[start:end].strip() == tokenizer.unk_token)
    ]
    return [(start, end) for start, end in spans if text[start:end].strip()]


def _broken(token: str, separated: bool) -> str:
    """A token with a space after its first sign; blank if that cannot help, or did not."""
    word = token.lstrip()
    if separated or len(word.rstrip()) < 2:
        return " " * len(token)
    return token[: len(token) - len(word)] + word[0] + " " + word[1:]
