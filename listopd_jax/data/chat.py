"""The chat template of a tokenizer: turns as the prompt, and templates that would spoil every prompt."""

import datetime
import re
from collections.abc import Sequence

import transformers

from listopd_jax.data.control import control_ids
from listopd_jax.errors import UserError, one_line
from listopd_jax.task.protocol import Message

DATE = "2024-07-26"
"""The date for templates that ask for today's: prompts must not change overnight."""

_THOUGHT = re.compile(
    r"[<\[◁]\|?(?P<closing>/|end_(?:of_)?)?(?:\w+:)?(?:start_|begin_of_)?"
    r"(?:think|thinking|thought|reason|reasoning)\|?[>\]▷]",
    re.IGNORECASE,
)
_FIX = "fix chat_template.jinja or set task.chat_template=False"
_DIRECTIVES = "a A b B c d e H I j m M p S U w x X y Y Z -d -m".split()


def chat_prompt(
    turns: Sequence[Message], tokenizer: transformers.PreTrainedTokenizerBase, date: str = DATE
) -> str:
    """`turns` with the assistant's turn opened and thinking switched off; `date` is an ISO date.

    Raises UserError, which names the tokenizer: it has no template, or one that fails, leaves out a message, or
    opens a thought and does not close it.
    """
    text = _render(turns, tokenizer, date, add_generation_prompt=True)
    tail = text
    for turn in turns:
        # Templates may trim a message, as Llama's does. In the end `tail` is what follows the last one.
        _, found, tail = text.rpartition(turn["content"].strip())
        if not found:
            raise UserError(
                f"{tokenizer.name_or_path}: its chat template leaves out or changes the {turn['role']}'s message; "
                f"{_FIX}"
            )
    thoughts = list(_THOUGHT.finditer(tail))
    if thoughts and not thoughts[-1]["closing"]:
        raise UserError(
            f"{tokenizer.name_or_path}: its chat template opens {thoughts[-1][0]} with thinking switched off and does "
            f"not close it, so every answer would be a thought; {_FIX}"
        )
    return text


def role_lines(turns: Sequence[Message]) -> str:
    """`turns` as lines of roles, the assistant's opened: how messages are put to a model without a chat template."""
    return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:\n"


def turn_ends(tokenizer: transformers.PreTrainedTokenizerBase) -> list[int]:
    """The id of the control token that the chat template writes after an assistant's words; [] if it writes none.

    White space may come before it. [] too if the template fails on an assistant's turn, which no prompt has.
    """
    words = "the answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": words}]
    try:
        tail = _render(turns, tokenizer, DATE).rpartition(words)[2]
    except UserError:
        return []
    after = tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"][:1]
    return [i for i in after if i in control_ids(tokenizer)]


def _render(turns: Sequence[Message], tokenizer, date: str, **options: bool) -> str:
    name = tokenizer.name_or_path
    if not tokenizer.chat_template:
        raise UserError(
            f"task.chat_template=True, but {name} has none; set it to False or use another tokenizer"
        )
    try:
        return tokenizer.apply_chat_template(
            list(turns),
            chat_template=_dated(tokenizer.get_chat_template(), datetime.date.fromisoformat(date)),
            tokenize=False,
            # Templates that know nothing of thinking ignore it.
            enable_thinking=False,
            **options,
        )
    except Exception as e:  # a template is a program: it can raise anything
        said = one_line(e)[:200]
        raise UserError(f"{name}: its chat template fails on {len(turns)} turn(s) ({said}); {_FIX}") from e


def _dated(template: str, date: datetime.date) -> str:
    """The template with a `strftime_now` that returns `date`, in place of the one that reads the clock."""
    if "strftime_now" not in template:
        return template
    known = "".join(f'|replace("%{d}", "{date.strftime("%" + d)}")' for d in _DIRECTIVES)
    return "{% macro strftime_now(format) %}{{ format" + known + " }}{% endmacro %}\n" + template
