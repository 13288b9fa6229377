"""A simulator of on-policy distillation small enough to run whole grids: lists of right-or-wrong decisions.

A list of K objects is a chain of decisions of a few *classes*: structural tokens inside objects, the comma
after objects 1 … K−2, the comma after object K−1 (the K−1→K transition, where the rival is `]`), the
bracket after object K. At each decision the student takes the right token or its one rival. All positions
of a class share parameters: the student's log-odds of class d on prompt i are base[i, d] + W[d] · features[i],
and W starts at zero, so that it starts as the base. A list parses if every decision is right;
a miss at an *ending* class ends the list, so that later positions are not visited. One class, one prompt
and one position is the Bernoulli reduction of EC §4.

Each step draws rollouts from the current student and takes one optimizer step on the project's own
objective, `ops.objective`, unchanged. Rollouts enter as visit counts, which is exact: given the parameters,
the lists of a batch are independent and their loss depends on the counts only. A grid of λ × c × seeds is
one `vmap`; every evaluation step is read along the same trajectory.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from listopd_jax.ops.head import entropy_of
from listopd_jax.ops.objective import Hyper, Variant, full_vocab_loss, log_normalizer, sampled_loss
from listopd_jax.theory.thresholds import log_odds

OBJECTS, TOKENS_PER_OBJECT = 8, 20  # of a list


class Process(NamedTuple):
    """The task: P prompts, D decision classes, F features; log-odds are of the right token."""

    teacher: Float[np.ndarray, "P D"]
    base: Float[np.ndarray, "P D"]
    features: Float[np.ndarray, "P F"]
    repeat: Int[np.ndarray, " D"]  # positions of each class in a complete list, in order of the classes
    ends: tuple[bool, ...]  # a miss in this class ends the list


class Recipe(NamedTuple):
    """How to train. Static: a new value compiles again."""

    variant: Variant = Variant()
    lists: int = 4  # rollouts of each prompt and step
    optimizer: str = "adam"  # or "sgd"
    lr: float = 0.05
    mismatch: float = 0.0  # standard deviation of the sampler's log-odds around the trainer's


class Curves(NamedTuple):
    """The results of a grid, each [λ, c, seed, budget] and the last with a class axis."""

    greedy: np.ndarray  # share of prompts whose greedy list parses
    sampled: np.ndarray  # probability that a sampled list parses
    log_odds: np.ndarray  # student's log-odds of the right token, mean over prompts, per class


def single_position(p: float, b: float, positions: int = 1) -> Process:
    """EC's Bernoulli reduction: one class seen `positions` times in a list, the same for every prompt."""
    one = np.ones((1, 1))
    return Process(log_odds(p) * one, log_odds(b) * one, one, np.array([positions]), (False,))


def listwise(
    structure: tuple[float, float],
    transition: tuple[float, float],
    *,
    spread: tuple[float, float] = (0.0, 0.0),
    prompts: int = 64,
) -> Process:
    """Lists of OBJECTS objects: (teacher p, base b) of the structural tokens and of the comma after object K−1.

    `spread` is the standard deviation over prompts of the teacher's and the base's log-odds at the
    transition; the student can learn both. Commas after earlier objects and the last bracket are
    structural.
    """
    z = np.random.default_rng(0).standard_normal((2, prompts))
    centers = [[log_odds(pair[i]) for pair in (structure, structure, transition, structure)] for i in (0, 1)]
    teacher, base = (np.tile(center, (prompts, 1)) for center in centers)
    for values, width, noise in zip((teacher, base), spread, z, strict=True):
        values[:, 2] += width * noise
    features = np.stack([np.ones(prompts), *z], 1)
    repeat = np.array([TOKENS_PER_OBJECT * OBJECTS, OBJECTS - 2, 1, 1])
    return Process(teacher, base, features, repeat, (False, True, True, True))


def run_grid(
    process: Process,
    recipe: Recipe,
    lambdas: Sequence[float],
    clips: Sequence[float] = (5.0,),
    seeds: Sequence[int] = (0,),
    eval_steps: Sequence[int] = (100,),
) -> Curves:
    """Train at every λ, c and seed, and read the policy after each of `eval_steps` (ascending)."""
    grid = list(itertools.product(lambdas, clips, seeds))
    lam, clip = (jnp.array([point[i] for point in grid], jnp.float32) for i in (0, 1))
    keys = jnp.stack([jax.random.key(point[2]) for point in grid])
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in process[:3])
    static = (recipe, tuple(int(n) for n in process.repeat), process.ends, tuple(eval_steps))
    outputs = _train_grid(arrays, lam, clip, keys, static)
    shape = (len(lambdas), len(clips), len(seeds), len(eval_steps))
    return Curves(*(np.asarray(x).reshape(*shape, *x.shape[2:]) for x in outputs))


@functools.partial(jax.jit, static_argnums=4)
def _train_grid(arrays, lam, clip, keys, static):
    return jax.vmap(lambda *point: _train(arrays, *point, static))(lam, clip, keys)


def _train(arrays, lam, clip, key, static):
    """One run: its readings at each budget."""
    recipe, repeat, ends, eval_steps = static
    teacher, base, features = arrays
    optimizer = {"adam": optax.adam(recipe.lr, b2=0.95), "sgd": optax.sgd(recipe.lr)}[recipe.optimizer]
    hyper = Hyper(lam=lam, clip=clip, kl_to_base=0.0, entropy_bonus=0.0, ppo_clip=0.0)

    def student(weights):
        return base + jnp.einsum("df,pf->pd", weights, features)

    def loss(weights, counts, rollout):
        per_token = _token_losses(student(weights), teacher, base, rollout, hyper, recipe.variant)
        return (counts * per_token).sum() / counts.sum()

    def step(carry, key):
        weights, state = carry
        noise_key, draw_key = jax.random.split(key)
        rollout = student(weights) + recipe.mismatch * jax.random.normal(noise_key, teacher.shape)
        counts = _draw_counts(draw_key, rollout, repeat, ends, recipe.lists)
        updates, state = optimizer.update(jax.grad(loss)(weights, counts, rollout), state, weights)
        weights = optax.apply_updates(weights, updates)
        return (weights, state), _read(student(weights), jnp.array(repeat))

    weights = jnp.zeros((teacher.shape[1], features.shape[1]))
    carry, keys = (weights, optimizer.init(weights)), jax.random.split(key, eval_steps[-1])
    readings = jax.lax.scan(step, carry, keys)[1]
    return jax.tree.map(lambda x: x[np.array(eval_steps) - 1], readings)


def _read(theta: Float[Array, "P D"], repeat: Int[Array, " D"]):
    """Greedy parse, sampled parse and mean log-odds of a policy; classes that a list does not have do not count."""
    right = (theta > 0) | (repeat == 0)
    sampled = jnp.exp((repeat * jax.nn.log_sigmoid(theta)).sum(-1))
    return right.all(-1).mean(), sampled.mean(), theta.mean(0)


def _draw_counts(key, theta: Float[Array, "P D"], repeat, ends, lists: int) -> Float[Array, "P D 2"]:
    """How often the rollouts of a batch took the right token and the rival, per prompt and class.

    The positions of an ending class are drawn one after the other, since a list that has ended draws no more; those of
    another class, which nothing interrupts, are drawn at once.
    """
    walk = [(d, 1 if ending else n) for d, (n, ending) in enumerate(zip(repeat, ends, strict=True))
            for _ in range(n if ending else 1)]  # fmt: skip
    classes, bulk = (jnp.array([position[i] for position in walk]) for i in (0, 1))
    ends = jnp.array(ends)

    def visit(alive, position):
        d, n, key = position
        asked = alive * n
        missed = jax.random.binomial(key, asked, jax.nn.sigmoid(-theta[:, d]))
        return jnp.where(ends[d], alive - missed, alive), jnp.stack([asked - missed, missed], -1)

    alive = jnp.full(theta.shape[0], float(lists))
    visits = jax.lax.scan(visit, alive, (classes, bulk, jax.random.split(key, len(walk))))[1]
    return jnp.zeros((*theta.shape, 2)).at[:, classes].add(visits.swapaxes(0, 1))


def _token_losses(theta, teacher, base, rollout, hyper: Hyper, variant: Variant) -> Float[Array, "P D 2"]:
    """The objective's loss of taking the right token, and of taking the rival, at each decision."""
    student, teacher, base, rollout = (_log_pair(x) for x in (theta, teacher, base, rollout))
    if variant.estimator == "full_vocab":
        tokens = jnp.zeros(theta.shape, jnp.int32)
        exact, _ = full_vocab_loss(student, teacher, base, tokens, hyper, variant, lam=hyper.lam)
        return jnp.stack([exact, exact], -1)
    entropy, lam, log_z = entropy_of(student)[..., None], hyper.lam, 0.0
    if variant.normalize:
        log_z = log_normalizer(teacher, base, lam, variant.advantage)[..., None]
    return sampled_loss(student, entropy, teacher, base, rollout, hyper, variant, lam=lam, log_z=log_z)[0]


def _log_pair(theta: Float[Array, "P D"]) -> Float[Array, "P D 2"]:
    return jnp.stack([jax.nn.log_sigmoid(theta), jax.nn.log_sigmoid(-theta)], -1)
