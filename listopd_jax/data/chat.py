"""The chat template of a tokenizer: one user turn as the prompt, and templates that would spoil every prompt."""

import datetime
import re

import transformers

from listopd_jax.errors import UserError, one_line

DATE = "2024-07-26"
"""What a template that asks is told today's date is: prompts must not change overnight."""

_THOUGHT = re.compile(
    r"[<\[◁]\|?(?P<closing>/|end_(?:of_)?)?(?:\w+:)?(?:start_|begin_of_)?"
    r"(?:think|thinking|thought|reason|reasoning)\|?[>\]▷]",
    re.IGNORECASE,
)
_DIRECTIVES = "a A b B c d e H I j m M p S U w x X y Y Z -d -m".split()


def chat_prompt(message: str, tokenizer: transformers.PreTrainedTokenizerBase, date: str = DATE) -> str:
    """`message` as one user turn, the assistant's turn opened and thinking switched off; `date` is an ISO date.

    Raises UserError, which names the tokenizer: it has no template, or one that fails, leaves out the message, or
    opens a thought and does not close it.
    """
    name, off = tokenizer.name_or_path, "or set task.chat_template=False"
    if not tokenizer.chat_template:
        raise UserError(f"task.chat_template=True, but {name} has none; use another tokenizer {off}")
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": message}],
            chat_template=_dated(tokenizer.get_chat_template(), datetime.date.fromisoformat(date)),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except Exception as e:  # a template is a program: it can raise anything
        raise UserError(
            f"{name}: its chat template fails on one user turn ({one_line(e)[:200]}); mend chat_template.jinja {off}"
        ) from e
    _, found, tail = text.rpartition(message.strip())
    if not found:
        raise UserError(
            f"{name}: its chat template leaves out or changes the user's message; mend chat_template.jinja {off}"
        )
    thoughts = list(_THOUGHT.finditer(tail))
    if thoughts and not thoughts[-1]["closing"]:
        raise UserError(
            f"{name}: its chat template opens {thoughts[-1][0]} with thinking switched off and does not close it, so "
            f"every answer would be a thought; close it in chat_template.jinja {off}"
        )
    return text


def _dated(template: str, date: datetime.date) -> str:
    """The template with a `strftime_now` of its own, which tells `date`, in place of the one that reads the clock."""
    if "strftime_now" not in template:
        return template
    known = "".join(f'|replace("%{d}", "{date.strftime("%" + d)}")' for d in _DIRECTIVES)
    return "{% macro strftime_now(format) %}{{ format" + known + " }}{% endmacro %}\n" + template
