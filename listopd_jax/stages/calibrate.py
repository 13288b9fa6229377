"""Calibration: the thresholds of λ read off the real teacher and base, before any update (EC §4; docs/theory.md).

`measure` decodes the teacher's greedy answers and looks at both models once along them; `calibrate` turns what it
saw into EC's clip-safe thresholds (EC Prop. 4.3) and our mode-flip ones, in NumPy alone, so that a notebook can ask
again with another clip or τ. `calibrate_stage` is the stage of a run: workdir/calibration.json, written once.
`calibrate_forecasts` adds λ_flip along the forecasts' own answers, on prefixes that the teacher's path never visits.

Greedy decoding from the target leaves the teacher's answer at the first position whose λ_flip lies below λ, so the
share of lists with a flip anywhere is exactly the share of lists that the target answers differently.

EC = Li, Jiang, Wang, Zhang, Yuen, arXiv:2605.08737.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from listopd_jax import files
from listopd_jax.data.input import as_teachers_read
from listopd_jax.metrics_log import progress
from listopd_jax.ops.guard import flip_lambda
from listopd_jax.ops.head import log_distribution, map_positions, take_token
from listopd_jax.ops.opd_loss import Frozen
from listopd_jax.parallel.compiler import OTHER, BackendJit
from listopd_jax.parallel.hosts import from_main, gather
from listopd_jax.records import (
    CALIBRATION,
    Calibration,
    ClassRow,
    CurvePoint,
    FlipRow,
    ForecastFlips,
    StripToken,
)
from listopd_jax.rollout.decode import generate
from listopd_jax.rollout.scoring import completion_hidden
from listopd_jax.rounding import ceil_div, round_up
from listopd_jax.stages.evaluate import Answer
from listopd_jax.stages.job import Job, base_of
from listopd_jax.stages.teachers import teacher_roles
from listopd_jax.task.codec import IS_STRUCTURAL, Codec
from listopd_jax.task.contract import TOKEN_CLASSES
from listopd_jax.theory.checks import Undefined
from listopd_jax.theory.thresholds import clip_safe_lambda_log_odds, probability

ENOUGH_PROMPTS = 200  # EC's minimum
LAMBDAS = tuple(round(1 + 0.05 * i, 2) for i in range(41))  # where the share of lists with a flip is read
ANSWER_STEP = 64  # answers are cut to a multiple of this: few shapes, so few compilations
_PERCENTILES = (1, 5, 25, 50)


class Positions(NamedTuple):
    """The positions of greedy answers, one after another, about the teacher's modal token m of each.

    Log-odds keep the digits that probabilities lose next to 1.
    """

    logit_p: Float[np.ndarray, " N"]  # of m under the teacher
    logit_b: Float[np.ndarray, " N"]  # of m under the base
    flip: Float[np.ndarray, " N"]  # λ_flip of m, ∞ if none
    token_class: Int[
        np.ndarray, " N"
    ]  # of m, or of a structural token in its place; index into TOKEN_CLASSES
    prompt: Int[np.ndarray, " N"]  # row of the split
    token: Int[np.ndarray, " N"]  # id of m
    written: Int[np.ndarray, " N"]  # id of the answer's own token: m along the teacher's answers

    @property
    def p(self) -> Float[np.ndarray, " N"]:
        """The teacher's maximum probability."""
        return probability(self.logit_p)

    @property
    def b(self) -> Float[np.ndarray, " N"]:
        """The base's probability of m."""
        return probability(self.logit_b)

    @property
    def log_ratio(self) -> Float[np.ndarray, " N"]:
        """log π_T(m) − log π_B(m)."""
        return np.logaddexp(0, -self.logit_b) - np.logaddexp(0, -self.logit_p)

    @property
    def structural(self) -> Bool[np.ndarray, " N"]:
        """Whether the contract dictates the token, or the one in its place."""
        return IS_STRUCTURAL[self.token_class]

    def where(self, mask: Bool[np.ndarray, " N"]) -> "Positions":
        """The positions that `mask` selects."""
        return Positions(*(x[mask] for x in self))


# --- looking at the models ---


def measure(
    graphs: Mapping[str, nnx.GraphDef],
    params_teacher: Any,
    params_base: Any,
    batches: Iterable[dict[str, np.ndarray]],
    codec: Codec,
    decoding: Mapping[str, Any],
    chunk: int,
) -> Positions:
    """Teacher and base at every position of the teacher's greedy answers to the prompts of `batches`.

    Args:
      graphs: static halves by role; the base's is `base_of` them.
      batches: evaluation batches, maybe with prompts of the teacher's own; filler rows (weight 0) are left out.
      decoding: how answers are written, Job.decoding.
      chunk: positions whose distributions over the vocabulary exist at one time.
    """
    models = (graphs["teacher"], base_of(graphs)), (params_teacher, params_base)
    parts = []
    for batch in progress(list(batches), "calibrate"):
        read = as_teachers_read(batch)
        rollout = generate(
            models[0][:1], models[1][:1], jnp.ones((1, 1)), read["prompt"], read["prompt_length"],
            jax.random.key(0), greedy=True, **decoding,
        )  # fmt: skip
        lengths = gather(rollout.lengths)
        size = min(decoding["max_tokens"], round_up(int(lengths.max()), ANSWER_STEP))
        parts += along(*models, batch, gather(rollout.tokens)[..., :size], lengths, codec, chunk)
    return concatenate_positions(parts)


def along(
    graphdefs: tuple[nnx.GraphDef, nnx.GraphDef],
    params: tuple[Any, Any],
    batch: dict[str, np.ndarray],
    answers: Int[np.ndarray, "B n T"],
    lengths: Int[np.ndarray, "B n"],
    codec: Codec,
    chunk: int,
) -> list[Positions]:
    """Teacher and base, in this order, at every position of n answers to each prompt of `batch`, one pass of each.

    The teacher reads its own prompts, if `batch` has such. Filler rows (weight 0) are left out. Each of the n has its
    own positions.
    """
    prompts = [
        (jnp.asarray(b["prompt"]), jnp.asarray(b["prompt_length"])) for b in (as_teachers_read(batch), batch)
    ]
    seen = _look(graphdefs, params, prompts, jnp.asarray(answers), vocab=codec.vocab, chunk=chunk)
    *numbers, modes = map(gather, seen)
    inside = (np.arange(answers.shape[-1]) < lengths[..., None]) & (batch["weight"] > 0)[:, None, None]
    index = np.broadcast_to(np.asarray(batch["index"])[:, None], lengths.shape)
    found = []
    for i in range(lengths.shape[1]):
        mask, written, mode = inside[:, i], answers[:, i], modes[:, i]
        classes = _classes(codec, written, mode, lengths[:, i])
        rows = np.broadcast_to(index[:, i, None], mask.shape)
        # From here on NumPy in float64: nothing below runs on a device.
        columns = *(x[:, i].astype(np.float64) for x in numbers), classes, rows, mode, written
        found.append(Positions(*(x[mask] for x in columns)))
    return found


def concatenate_positions(parts: Iterable[Positions]) -> Positions:
    """The positions of all `parts`, one part after the other."""
    return Positions(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _classes(
    codec: Codec,
    answers: Int[np.ndarray, "B T"],
    modes: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
) -> Int[np.ndarray, "B T"]:
    """The class of each position, −1 after the end: of the teacher's token, or of what is written in its place.

    That is structural if one of the two is: a list may end where the teacher continues, and where it writes a score.
    """
    classes = codec.classes(answers, lengths)
    for row, at in np.argwhere((modes != answers) & (classes >= 0)):
        prefix = np.append(answers[row, :at], modes[row, at])
        mode = codec.classes(prefix[None], np.array([at + 1]))[0, at]
        classes[row, at] = mode if IS_STRUCTURAL[mode] else classes[row, at]
    return classes


@functools.partial(BackendJit, options=OTHER, static_argnames=("graphdefs", "vocab", "chunk"))
def _look(
    graphdefs: tuple[nnx.GraphDef, nnx.GraphDef],
    params: tuple[Any, Any],
    prompts: list[tuple[Int[Array, "B _"], Int[Array, " B"]]],
    answers: Int[Array, "B n T"],
    *,
    vocab: int,
    chunk: int,
) -> tuple[Float[Array, "B n T"], Float[Array, "B n T"], Float[Array, "B n T"], Int[Array, "B n T"]]:
    """logit p, logit b and λ_flip of the teacher's modal token, and its id, at every answer position.

    Each model reads prompts of its own.
    """
    # Reductions to three numbers per position happen on the device; no distribution reaches the host.
    decoders = [nnx.merge(g, p) for g, p in zip(graphdefs, params, strict=True)]
    hiddens = [completion_hidden(d, *read, answers) for d, read in zip(decoders, prompts, strict=True)]
    heads = [d.head_weight().astype(h.dtype) for d, h in zip(decoders, hiddens, strict=True)]

    def rows(hiddens):
        log_t, log_b = (log_distribution(h, head, vocab) for h, head in zip(hiddens, heads, strict=True))
        mode = log_t.argmax(-1)
        return _log_odds(log_t, mode), _log_odds(log_b, mode), flip_lambda(log_t, log_b, mode), mode

    flat = tuple(h.reshape(-1, h.shape[-1]) for h in hiddens)
    return tuple(x.reshape(answers.shape) for x in map_positions(rows, flat, chunk))


def _log_odds(logp: Float[Array, "s V"], token: Int[Array, " s"]) -> Float[Array, " s"]:
    """Log-odds of `token`; the complement is summed over the other tokens, so that p → 1 keeps its digits."""
    is_token = jnp.arange(logp.shape[-1]) == token[:, None]
    return take_token(logp, token) - jax.nn.logsumexp(jnp.where(is_token, -jnp.inf, logp), axis=-1)


# --- from positions to thresholds ---


def calibrate(
    positions: Positions,
    clip: float,
    tau: float = 0.9,
    bootstrap: int = 2000,
    seed: int = 0,
) -> Calibration:
    """The thresholds of `positions` at clip c; a number is None, with its reason, where it does not exist.

    Over the positions with p ≥ `tau` (EC Prop. 4.3), but `classes`, `flips` and `curve` over all, since the mode flips
    where the teacher is unsure. A maximum is never above the observed one in a resample: read the interval of p_safe as
    its lower end. No positions, c ≤ 0 or τ outside (0, 1): ValueError.
    """
    if not len(positions.p):
        raise ValueError("no positions to calibrate on")
    if not (clip > 0 and 0 < tau < 1):
        raise ValueError(f"clip = {clip:g}, tau = {tau:g}: must be positive and strictly between 0 and 1")
    kept = positions.where(positions.p >= tau)
    table, prompts = _prompt_means(kept), len(np.unique(positions.prompt))
    numbers, reasons = _thresholds(table, clip, tau)
    intervals, notes = _intervals(table, clip, bootstrap, seed)
    return Calibration(
        clip=_finite(clip),
        tau=tau,
        prompts=prompts,
        positions=len(positions.p),
        kept=len(kept.p),
        **numbers,
        **_spread(kept.p, kept.logit_p),
        reasons=reasons,
        intervals=intervals,
        classes=_class_rows(positions, clip, tau),
        flips=_flip_rows(positions),
        curve=_curve(positions),
        notes=_notes(prompts, len(table), tau) + notes,
    )


def calibrate_stage(job: Job, frozen: Frozen) -> Calibration:
    """Calibrate on the validation lists and write workdir/calibration.json; only read it if it is there.

    Each list is read with its own teacher.
    """
    path, config = job.workdir / CALIBRATION, job.config
    saved = from_main(lambda: files.read_json(path) if path.exists() else None)
    if saved is not None:
        return Calibration.from_json(saved, str(path))
    params = dict(zip(teacher_roles(job.models), frozen.teachers, strict=True))
    measured = {
        role: measure(
            job.graphs | {"teacher": job.graphs[role]}, params[role], frozen.base, batches, job.codec, job.decoding,
            config.opd.head_chunk,
        )
        for role, batches in job.by_teacher()
    }  # fmt: skip
    positions = Positions(*map(np.concatenate, zip(*measured.values(), strict=True)))
    found = calibrate(positions, config.opd.clip, bootstrap=config.evaluation.bootstrap, seed=config.seed)
    notes = found.notes + _objective_notes(config.opd) + _teacher_notes(measured, config.opd.clip)
    strip = strip_of(positions, job.codec)
    found = dataclasses.replace(found, notes=notes, strip=strip)
    files.write_json(path, found.to_json())
    return found


def calibrate_forecasts(
    job: Job, frozen: Frozen, lambdas: Sequence[float], answers: Sequence[Sequence[Answer]], guard: str = ""
) -> None:
    """Add to workdir/calibration.json what teacher and base say along the forecasts' own answers, λ by λ.

    `answers` are those of one λ to every validation prompt, for each of `lambdas`; one pass of both models scores all.
    `guard`: the one that they are under.
    """
    params = dict(zip(teacher_roles(job.models), frozen.teachers, strict=True))
    ids = [{answer.index: answer.tokens for answer in column} for column in answers]
    parts = []
    for role, batches in job.by_teacher(job.config.forecast.batch_size):
        models = (job.graphs[role], base_of(job.graphs)), (params[role], frozen.base)
        for batch in progress(list(batches), "calibrate forecasts"):
            written = [[column[index] for column in ids] for index in batch["index"].tolist()]
            lengths = np.array([[len(tokens) for tokens in row] for row in written])
            tokens = padded(written, round_up(int(lengths.max()), ANSWER_STEP), job.codec.pad)
            parts.append(along(*models, batch, tokens, lengths, job.codec, job.config.opd.head_chunk))
    rows = [
        dataclasses.replace(forecast_row(lam, concatenate_positions(column)), guard=guard)
        for lam, column in zip(lambdas, zip(*parts, strict=True), strict=True)
    ]
    _add_forecasts(job.workdir / CALIBRATION, rows)


def forecast_row(lam: float, positions: Positions) -> ForecastFlips:
    """What `positions` along the forecast at λ say, list by list."""
    prompts, rows = np.unique(positions.prompt, return_inverse=True)
    agrees = np.full(len(prompts), True)
    np.logical_and.at(agrees, rows, positions.token == positions.written)
    first = _first_flips(positions)["structural"]
    return ForecastFlips(
        lam=float(lam),
        agreement=float(agrees.mean()),
        flipped=float((first < lam).mean()),
        **_quantiles(first),
        never=float(np.isinf(first).mean()),
    )


def padded(answers: Sequence[Sequence[Sequence[int]]], size: int, pad: int) -> Int[np.ndarray, "B n T"]:
    """Token ids, each row filled up to `size`."""
    return np.array([[[*ids, *[pad] * (size - len(ids))] for ids in row] for row in answers], np.int32)


def _add_forecasts(path: pathlib.Path, rows: Sequence[ForecastFlips]) -> None:
    """Write `rows` into a calibration, in place of those of the same λ and guard."""
    saved = from_main(lambda: files.read_json(path))
    found, new = Calibration.from_json(saved, str(path)), {(row.lam, row.guard) for row in rows}
    kept = [row for row in found.forecasts if (row.lam, row.guard) not in new]
    both = tuple(sorted([*kept, *rows], key=lambda row: (row.lam, row.guard)))
    files.write_json(path, dataclasses.replace(found, forecasts=both).to_json())


def strip_of(positions: Positions, codec: Codec) -> tuple[StripToken, ...]:
    """The answer whose structural tokens flip first, token by token; the first one where none flips."""
    flips = np.where(positions.structural, positions.flip, np.inf)
    answer = positions.where(positions.prompt == positions.prompt[flips.argmin()])
    texts = [codec.text([token]) or "end" for token in answer.token.tolist()]
    classes = [TOKEN_CLASSES[i] for i in answer.token_class]
    columns = zip(
        texts, classes, answer.p.tolist(), answer.b.tolist(), map(_finite, answer.flip), strict=True
    )
    return tuple(StripToken(text=t, token_class=c, p=p, b=b, flip=f) for t, c, p, b, f in columns)


def _prompt_means(kept: Positions) -> Float[np.ndarray, "n 5"]:
    """Within-prompt means of p, 1−p, b, 1−b and log π_T/π_B; the complements are not taken from rounded ones."""
    prompts, rows = np.unique(kept.prompt, return_inverse=True)
    columns = (kept.p, probability(-kept.logit_p), kept.b, probability(-kept.logit_b), kept.log_ratio)
    sums = [np.bincount(rows, column, len(prompts)) for column in columns]
    return np.stack(sums, 1) / np.bincount(rows, minlength=len(prompts))[:, None]


def _estimates(weights: Float[np.ndarray, "R n"], table: Float[np.ndarray, "n 5"]) -> dict[str, np.ndarray]:
    """p_typ, p_safe and both b under R weightings of the prompts, [R] each, with their log-odds ("logit_…")."""
    with np.errstate(invalid="ignore"):  # an infinite log-ratio (b = 0) that a resample leaves out: NaN
        p, tail, b, b_tail, log_ratio = (weights @ table / weights.sum(1, keepdims=True)).T
    # The largest p, found by its complement: 1 − p keeps the digits that p loses next to 1.
    safest = np.where(weights > 0, table[:, 1], np.inf).argmin(1)
    implied = p * np.exp(-log_ratio)
    pairs = {
        "p_typ": (p, tail),
        "p_safe": (table[safest, 0], table[safest, 1]),
        "b_measured": (b, b_tail),
        # 1 − p·exp(−r) = (1 − p) − p·(exp(−r) − 1), with r the mean log-ratio and no cancellation.
        "b_implied": (implied, tail - p * np.expm1(-log_ratio)),
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        logits = {f"logit_{name}": np.log(x) - np.log(rest) for name, (x, rest) in pairs.items()}
    return {name: x for name, (x, _) in pairs.items()} | logits


_LAMBDA_OF = {
    f"lambda_{scale}_{reading}": (f"logit_p_{scale}", f"logit_b_{reading}")
    for scale in ("typ", "safe")
    for reading in ("measured", "implied")
}


def _thresholds(table, clip: float, tau: float) -> tuple[dict[str, float | None], dict[str, str]]:
    """p_typ, p_safe, both b and the four λ*, and why those that are None do not exist."""
    names = ("p_typ", "p_safe", "b_measured", "b_implied")
    if not len(table):
        absent = dict.fromkeys((*names, *_LAMBDA_OF))
        return absent, dict.fromkeys(absent, f"no position has p ≥ {tau:g}")
    found = {name: float(x[0]) for name, x in _estimates(np.ones((1, len(table))), table).items()}
    lambdas = {name: _clip_lambda(found[p], found[b], clip) for name, (p, b) in _LAMBDA_OF.items()}
    numbers = {name: found[name] for name in names} | {name: lam for name, (lam, _) in lambdas.items()}
    return numbers, {name: reason for name, (_, reason) in lambdas.items() if reason}


def _clip_lambda(logit_p: float, logit_b: float, clip: float) -> tuple[float | None, str | None]:
    """λ* of EC Eq. 4, or None and why it does not exist."""
    if not np.isfinite([logit_p, logit_b]).all():
        return None, "λ* is undefined: p or b does not lie strictly between 0 and 1"
    if np.isinf(clip):
        return None, "λ* is infinite: without a clip there is no boundary to cross"
    try:
        return clip_safe_lambda_log_odds(logit_p, logit_b, clip), None
    except Undefined as e:
        return None, str(e)


def _intervals(table, clip: float, bootstrap: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """95 % percentile intervals by resampling prompts (Efron 1979), and notes on what is undefined in resamples."""
    names = ("p_typ", "p_safe", "b_measured", "b_implied", "lambda_typ_measured", "lambda_typ_implied")
    n = len(table)
    if n == 0 or bootstrap == 0:
        return dict.fromkeys(names), []
    # A resample of prompts is a vector of counts, so all of them are one matrix product.
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=bootstrap).astype(np.float64)
    found = _estimates(counts, table)
    for name in names[4:]:
        found[name] = _clip_lambdas(*(found[x] for x in _LAMBDA_OF[name]), clip)
    defined = {name: found[name][np.isfinite(found[name])] for name in names}
    notes = [
        f"{name} does not exist in {bootstrap - len(x)} of {bootstrap} resamples; its interval is over the others."
        for name, x in defined.items()
        if 0 < len(x) < bootstrap
    ]
    return {k: np.percentile(x, [2.5, 97.5]).tolist() if x.size else None for k, x in defined.items()}, notes


def _clip_lambdas(logit_p: Float[np.ndarray, " R"], logit_b: Float[np.ndarray, " R"], clip: float):
    """λ* [R], NaN where it does not exist."""
    finite = np.isfinite(logit_p) & np.isfinite(logit_b)
    lam = np.full(finite.shape, np.nan)
    lam[finite] = clip_safe_lambda_log_odds(logit_p[finite], logit_b[finite], clip, undefined="nan")
    return lam


def _spread(p: Float[np.ndarray, " N"], logit_p: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """p token by token: the ways to sum it up other than EC's."""
    names = ("p_max", "p_mean", "p_geometric_mean", "p_percentile_5", "p_min")
    if not p.size:
        return dict.fromkeys(names)
    geometric = np.exp(-np.logaddexp(0, -logit_p).mean())
    values = (p.max(), p.mean(), geometric, np.percentile(p, 5), p.min())
    return dict(zip(names, map(float, values), strict=True))


def _class_rows(positions: Positions, clip: float, tau: float) -> tuple[ClassRow, ...]:
    """One row a token class that occurs, in the order of TOKEN_CLASSES."""
    return tuple(
        _class_row(TOKEN_CLASSES[i], positions.where(positions.token_class == i), clip, tau)
        for i in np.unique(positions.token_class)
    )


def _class_row(name: str, positions: Positions, clip: float, tau: float) -> ClassRow:
    kept = positions.where(positions.p >= tau)
    one_prompt = kept._replace(prompt=np.zeros_like(kept.prompt))  # so that every position counts the same
    numbers, reasons = _thresholds(_prompt_means(one_prompt), clip, tau)
    return ClassRow(
        token_class=name,
        positions=len(positions.p),
        kept=len(kept.p),
        p=numbers["p_typ"],
        b=numbers["b_measured"],
        lam=numbers["lambda_typ_measured"],
        reason=reasons.get("lambda_typ_measured"),
        **{f"flip_{name}": x for name, x in _quantiles(positions.flip).items()},
    )


def _first_flips(positions: Positions) -> dict[str, Float[np.ndarray, " n"]]:
    """The smallest λ_flip of each list, over its structural positions and over all."""
    prompts, rows = np.unique(positions.prompt, return_inverse=True)
    first = {}
    for name, mask in (("structural", positions.structural), ("all", np.full(rows.shape, True))):
        first[name] = np.full(len(prompts), np.inf)
        np.minimum.at(first[name], rows[mask], positions.flip[mask])
    return first


def _flip_rows(positions: Positions) -> tuple[FlipRow, ...]:
    return tuple(
        FlipRow(positions=name, **_quantiles(first), never=float(np.isinf(first).mean()))
        for name, first in _first_flips(positions).items()
    )


def _curve(positions: Positions) -> tuple[CurvePoint, ...]:
    first = _first_flips(positions)
    return tuple(
        CurvePoint(lam=lam, **{name: float((flip < lam).mean()) for name, flip in first.items()})
        for lam in LAMBDAS
    )


def _quantiles(flip: Float[np.ndarray, " N"]) -> dict[str, float | None]:
    """Minimum and percentiles of λ_flip by the inverse distribution function: ∞ cannot be interpolated."""
    ranked = np.sort(flip)
    ranks = {q: max(0, ceil_div(q * len(ranked), 100) - 1) for q in _PERCENTILES}
    rest = {f"percentile_{q}": _finite(ranked[rank]) for q, rank in ranks.items()}
    return {"min": _finite(ranked[0])} | rest


def _finite(x: float) -> float | None:
    return float(x) if np.isfinite(x) else None


def _notes(prompts: int, with_kept: int, tau: float) -> list[str]:
    notes = []
    if prompts < ENOUGH_PROMPTS:
        notes.append(
            f"Only {prompts} prompts: EC asks for {ENOUGH_PROMPTS} or more, the intervals may mislead."
        )
    if 0 < with_kept < prompts:
        notes.append(
            f"{prompts - with_kept} prompts have no position with p ≥ {tau:g} and count in no mean of p or b."
        )
    return notes


def _teacher_notes(measured: Mapping[str, Positions], clip: float) -> list[str]:
    """Of several teachers, what each has on its own lists."""
    if len(measured) == 1:
        return []
    notes = []
    for role, positions in measured.items():
        found = calibrate(positions, clip, bootstrap=0)
        lam = "undefined" if found.lambda_typ_measured is None else f"{found.lambda_typ_measured:.3f}"
        notes.append(
            f"The {role} alone, on its {found.prompts} prompts: λ* (typical p, measured b) is {lam}."
        )
    return notes


def _objective_notes(opd: Any) -> list[str]:
    """Where the run's objective is not the one that the formulas are about."""
    notes = []
    if opd.ratio != "teacher_student":
        notes.append(f"Eq. 4 is about opd.ratio=teacher_student; this run has {opd.ratio}.")
    if opd.advantage == "no_base":
        notes.append(
            "opd.advantage=no_base does not extrapolate from the base: neither λ* nor λ_flip applies to this run."
        )
    if opd.estimator == "full_vocab":
        notes.append(
            "opd.estimator=full_vocab has no importance ratio to clip: only λ_flip applies to this run."
        )
    return notes
