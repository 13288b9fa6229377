"""Records to ids: prompts, cut where they are too long, the right answers, and answers broken on purpose."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import transformers
from jaxtyping import Int32

from listopd_jax.data.chat import DATE, chat_prompt, role_lines
from listopd_jax.data.control import control_ids, spell_out
from listopd_jax.data.reviews import hash64
from listopd_jax.errors import UserError
from listopd_jax.metrics_log import progress
from listopd_jax.rounding import round_up
from listopd_jax.task.protocol import Prompt, Task


class AnswerNoise(NamedTuple):
    """Shares of SFT answers that are broken, each by one corruption of the task: names and shares, in order."""

    shares: tuple[tuple[str, float], ...] = ()
    seed: int = 0


NO_NOISE = AnswerNoise()


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """A split as ids; with several teachers, each record's own; where teachers read other prompts, those too."""

    prompts: tuple[Int32[np.ndarray, " _"], ...]
    answers: tuple[Int32[np.ndarray, " _"], ...]
    pad_id: int
    own_teacher: Int32[np.ndarray, " N"] | None = None
    teacher_prompts: tuple[Int32[np.ndarray, " _"], ...] | None = None

    @functools.cached_property
    def prompt_lengths(self) -> Int32[np.ndarray, " N"]:
        return np.array([len(p) for p in self.prompts], np.int32)

    @functools.cached_property
    def answer_width(self) -> int:
        """The longest answer, rounded up to a multiple of 16."""
        return round_up(max(map(len, self.answers)), 16)


def encode_split(
    task: Task,
    records: Sequence[Any],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    max_prompt: int,
    max_answer: int,
    chat_template: bool = False,
    chat_date: str = DATE,
    ends: Collection[int] = (),
) -> EncodedSplit:
    """Encode prompts and SFT answers.

    A record whose prompt is above `max_prompt` tokens is cut as its task says, to the largest size that fits; its
    answer stays whole. With `chat_template` the assistant's turn is opened and thinking switched off, on `chat_date`.
    `ends` are the ids other than EOS that end a turn. A record without an answer has EOS alone.

    Raises:
      UserError: no chat template though one is asked for, or an unfit one; a prompt that ends in EOS or cannot be cut
        enough; an answer above `max_answer` tokens (EOS included), that the tokenizer cannot spell, or in which it sees
        a control token.
    """

    def to_ids(record: Any) -> np.ndarray:
        return prompt_ids(task.prompt(record), tokenizer, chat_template, chat_date)

    prompts, answers = [], []
    for record in progress(records, f"encoding {task.name}"):
        ids = to_ids(record)
        prompts.append(ids if len(ids) <= max_prompt else _truncate_prompt(task, record, to_ids, max_prompt))
        answers.append(answer_ids(task, record, tokenizer))
    # All prompts end in the same template, so one shows it.
    _check_open(prompts[0], tokenizer, {tokenizer.eos_token_id, *ends}, chat_template)
    _check_answers(task, records, answers, tokenizer, max_answer)
    _check_no_control(records, answers, tokenizer, control_ids(tokenizer) | set(ends))
    return EncodedSplit(tuple(prompts), tuple(answers), tokenizer.pad_token_id)


def with_noise(
    split: EncodedSplit,
    task: Task,
    records: Sequence[Any],
    tokenizer: transformers.PreTrainedTokenizerBase,
    noise: AnswerNoise,
) -> EncodedSplit:
    """The encoded `records` with a share of their answers broken by `noise`; the prompts are the same arrays."""
    answers = tuple(answer_ids(task, record, tokenizer, noise) for record in records)
    return dataclasses.replace(split, answers=answers)


def rows_of(split: EncodedSplit, rows: Sequence[int]) -> EncodedSplit:
    """The split with `rows` alone; itself if those are all."""
    if len(rows) == len(split.prompts):
        return split

    def of_rows(ids):
        return None if ids is None else tuple(ids[i] for i in rows)

    own = None if split.own_teacher is None else split.own_teacher[np.asarray(rows)]
    prompts, answers, others = map(of_rows, (split.prompts, split.answers, split.teacher_prompts))
    return EncodedSplit(prompts, answers, split.pad_id, own, others)


def teacher_prompts(
    split: EncodedSplit,
    task: Task,
    records: Sequence[Any],
    tokenizer: transformers.PreTrainedTokenizerBase,
    *,
    max_prompt: int,
    chat_template: bool,
    chat_date: str,
    ends: Collection[int],
) -> tuple[Int32[np.ndarray, " _"], ...]:
    """The ids of what teachers read before the answers to the encoded `records`: their own prompts, or the same.

    UserError if one ends in EOS, or is above `max_prompt` tokens: none is cut.
    """
    own = {i: p for i, r in enumerate(records) if (p := task.teacher_prompt(r)) is not None}
    ids = {i: prompt_ids(p, tokenizer, chat_template, chat_date) for i, p in own.items()}
    prompts = tuple(ids.get(i, prompt) for i, prompt in enumerate(split.prompts))
    first = next(iter(ids.values()), prompts[0])
    _check_open(first, tokenizer, {tokenizer.eos_token_id, *ends}, chat_template)
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    if len(prompts[longest]) > max_prompt:
        raise UserError(
            f"{task.name} {records[longest].key}: the teacher's prompt takes {len(prompts[longest])} tokens, above "
            f"teachers.max_prompt={max_prompt}; raise it or make the prompt shorter"
        )
    return prompts


def prompt_ids(
    prompt: Prompt,
    tokenizer: transformers.PreTrainedTokenizerBase,
    chat_template: bool,
    chat_date: str = DATE,
) -> Int32[np.ndarray, " prompt"]:
    """Ids of a prompt: a text is one user turn; without a template all start with the tokenizer's BOS, if any.

    Nothing in it becomes a control token: text that spells one is broken up. Without a chat template a text stays as it
    is, and messages are lines of roles.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [{**turn, "content": spell_out(turn["content"], tokenizer)} for turn in turns]
    if chat_template:
        text = chat_prompt(turns, tokenizer, chat_date)
    else:
        text = turns[0]["content"] if isinstance(prompt, str) else role_lines(turns)
    # A chat template writes BOS itself; the tokenizer would add a second one.
    return np.array(tokenizer(text, add_special_tokens=not chat_template)["input_ids"], np.int32)


def _check_open(
    prompt: Int32[np.ndarray, " prompt"], tokenizer, ends: Collection[int], chat_template: bool
) -> None:
    """UserError if the last token of a prompt that is not white space ends a turn: nothing is left to be said."""
    last = next((i for i in prompt[::-1].tolist() if tokenizer.decode([i]).strip()), None)
    if last in ends:
        fix = (
            "its chat template must open the assistant's turn, fix chat_template.jinja or set task.chat_template=False"
            if chat_template
            else "set add_eos_token to false in tokenizer_config.json, or fix tokenizer.json's post_processor"
        )
        raise UserError(f"{tokenizer.name_or_path}: prompts end in EOS {tokenizer.decode([last])!r}; {fix}")


def _check_answers(
    task: Task, records: Sequence[Any], answers: Sequence[np.ndarray], tokenizer, max_answer: int
) -> None:
    """UserError for a right answer that is too long, or that breaks the contract once decoded."""
    longest = max(map(len, answers))
    if longest > max_answer:
        raise UserError(
            f"an answer takes {longest} tokens, above task.max_response={max_answer}; raise it or make answers shorter"
        )
    for record, ids in zip(records, answers, strict=True):
        text = tokenizer.decode(ids[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if task.answer(record) is not None and not (parsed := task.parse(text, record)).ok:
            raise UserError(
                f"{record.key}: its right answer comes back from the tokenizer as {' '.join(text.split())[:60]!r}, "
                f"which fails the contract ({parsed.failure}); correct it, or choose another tokenizer"
            )


def _check_no_control(
    records: Sequence[Any], answers: Sequence[np.ndarray], tokenizer, control: Collection[int]
) -> None:
    """UserError for a right answer in which text becomes a control token: SFT would teach to stop in mid-answer."""
    for record, ids in zip(records, answers, strict=True):
        if (found := next((i for i in ids[:-1].tolist() if i in control), None)) is not None:
            raise UserError(
                f"{record.key}: its right answer holds {tokenizer.decode([found])!r}, which the tokenizer reads as a "
                "control token; write it otherwise, or leave the record out"
            )


def answer_ids(
    task: Task, record: Any, tokenizer: transformers.PreTrainedTokenizerBase, noise: AnswerNoise = NO_NOISE
) -> Int32[np.ndarray, " answer"]:
    """Ids of the right answer, or of one that `noise` broke, and EOS; EOS alone where there is no answer."""
    text = noisy_answer(task, record, noise) or ""
    # No special tokens: the answer follows a prompt that has BOS already.
    return np.array(
        [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id], np.int32
    )


def noisy_answer(task: Task, record: Any, noise: AnswerNoise) -> str | None:
    """The right answer, or one that a corruption of the task broke; None where there is no answer.

    Which records are broken depends on their key and `noise.seed` alone, so it is the same in every epoch.
    """
    right, seed = task.answer(record), hash64(record.key, str(noise.seed))
    names, shares = zip(*noise.shares, strict=True) if noise.shares else ((), ())
    ends = zip(names, itertools.accumulate(shares), strict=True)
    # The hash is the record's own uniform number in [0, 1).
    name = next((name for name, end in ends if seed / 2**64 < end), None)
    broken = right is not None and name is not None
    return task.corruptions[name](record, random.Random(seed)) if broken else right


def rendered(task: Task, records: Sequence[Any]) -> Iterator[str]:
    """Prompts and answers as text: what a tokenizer for these records is trained on."""
    for record in records:
        prompt, answer = task.prompt(record), task.answer(record)
        yield prompt if isinstance(prompt, str) else role_lines(prompt)
        if answer is not None:
            yield answer


def _truncate_prompt(
    task: Task, record: Any, to_ids: Callable[[Any], np.ndarray], max_prompt: int
) -> Int32[np.ndarray, " prompt"]:
    """The prompt of the record cut in the first of its task's ways that makes it fit, to the largest size."""
    for cut, whole in task.shortened(record):
        if fits := _most_that_fit(lambda n, cut=cut: len(to_ids(cut(n))) <= max_prompt, whole):
            return to_ids(cut(fits))
    raise UserError(
        f"{task.name} {record.key}: its prompt takes {len(to_ids(record))} tokens, above task.max_prompt={max_prompt}, "
        "and cannot be cut to fit; raise it or make the prompt shorter"
    )


def _most_that_fit(fit: Callable[[int], bool], too_many: int) -> int:
    """The largest number below `too_many` that fits, by bisection: more never make a shorter prompt. 0 if none does."""
    fits = 0
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if fit(middle) else (fits, middle)
    return fits
