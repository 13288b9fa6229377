"""Adapters: their gradients, their place in the steps, peft's files in and out, and a whole job that trains one."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from listopd_jax import config as config_module
from listopd_jax.data.tokenizer import train_tokenizer
from listopd_jax.errors import UserError, exit_code
from listopd_jax.export import main as export_main
from listopd_jax.models import hf
from listopd_jax.models.build import initial_params, model_config, weights_digest
from listopd_jax.models.config import PROJECTIONS, Lora, ModelConfig, lora_params
from listopd_jax.models.decoder import abstract
from listopd_jax.models.lora import (
    abstract_adapter,
    initial_adapter,
    merge_adapter,
    stack_adapters,
    with_adapter,
)
from listopd_jax.ops.objective import Hyper, Variant
from listopd_jax.ops.opd_loss import Frozen, Models
from listopd_jax.records import read_results
from listopd_jax.report.write import write_report
from listopd_jax.rollout.decode import Rollout, generate
from listopd_jax.stages.forgetting import TEXTS
from listopd_jax.stages.pipeline import run_stages
from listopd_jax.task.prompt import render_answer
from listopd_jax.train.opd_step import OpdBatch, make_opd_step
from listopd_jax.train.optimizer import init_state
from listopd_jax.train.sft_step import make_sft_step

SHAPE = ModelConfig(61, 24, 40, 2, 4, 2, 8, tied=False)
LORA = Lora(3, 5.0, PROJECTIONS)
GRAPH, WITH = abstract(SHAPE)[0], abstract(SHAPE, lora=LORA)[0]


def drawn(tree, seed=0):
    """Random arrays in the shapes of `tree`."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) / x.shape[-1] ** 0.5, jnp.float32), tree
    )


BASE, ADAPTER = drawn(abstract(SHAPE)[1]), drawn(abstract_adapter(SHAPE, LORA), 1)
TOKENS = np.random.default_rng(2).integers(0, 61, (3, 9)).astype(np.int32)
LENGTHS = np.array([9, 6, 2])


def close(ours, theirs, rtol=1e-5):
    """Every leaf within rtol of its largest value."""
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * float(np.abs(b).max()) + 1e-9, err_msg=jax.tree_util.keystr(path)
        )


def bits(ours, theirs):
    """Every leaf the same."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def logits(graph, params):
    decoder = nnx.merge(graph, params)
    return decoder(TOKENS, LENGTHS) @ decoder.head_weight().T


# --- the adapter


def test_it_is_as_large_as_is_said_and_changes_nothing_at_first():
    new = initial_adapter(SHAPE, LORA, seed=0)
    assert sum(x.size for x in jax.tree.leaves(new)) == lora_params(SHAPE, LORA)
    bits(merge_adapter(BASE, new, LORA), BASE)
    np.testing.assert_array_equal(logits(WITH, with_adapter(BASE, new)), logits(GRAPH, BASE))
    other = initial_adapter(SHAPE, LORA, seed=1)
    assert not np.array_equal(new["layers"]["q_lora_a"][...], other["layers"]["q_lora_a"][...])


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q", "v"), ("o",)])
def test_gradients_are_those_of_the_merged_model(targets):
    """dA = s dW Bᵀ and dB = s Aᵀ dW, dW the gradient of the merged weight."""
    lora = Lora(3, 5.0, targets)
    adapter = drawn(abstract_adapter(SHAPE, lora), 1)
    weights = np.random.default_rng(3).normal(size=(3, 9, 61))
    weights[np.arange(9) >= LENGTHS[:, None]] = 0
    graph = abstract(SHAPE, lora=lora)[0]

    def loss(graph, params):
        return (jax.nn.log_softmax(logits(graph, params)) * weights).sum()

    ours = jax.jit(jax.value_and_grad(lambda a: loss(graph, with_adapter(BASE, a))))(adapter)
    dense = jax.jit(jax.value_and_grad(lambda p: loss(GRAPH, p)))(merge_adapter(BASE, adapter, lora))
    assert float(ours[0]) == pytest.approx(float(dense[0]), rel=1e-5)
    factors, dW = ({p[-1]: x[...] for p, x in nnx.to_flat_state(t)} for t in (adapter, dense[1]))
    for path, grad in nnx.to_flat_state(ours[1]):
        name, factor = path[-1].split("_lora_")
        a, b = factors[f"{name}_lora_a"], factors[f"{name}_lora_b"]
        a, b = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
        d = np.asarray(dW[name]).reshape(2, a.shape[1], b.shape[2])
        expected = d @ b.swapaxes(1, 2) if factor == "a" else a.swapaxes(1, 2) @ d
        close(grad[...], lora.scale * expected.reshape(grad.shape), rtol=2e-5)


def test_every_pass_has_it():
    """Prefill and decoding too: greedy answers of the model with its adapter are those of the merged one."""
    options = dict(max_tokens=12, vocab=61, eos=(), pad=0, temperature=1.0)
    prompts, key = jnp.asarray(TOKENS), jax.random.key(0)
    whole = merge_adapter(BASE, ADAPTER, LORA)
    ours, theirs = (
        generate((g,), (p,), jnp.ones((1, 2)), prompts, jnp.asarray(LENGTHS), key, **options)
        for g, p in ((WITH, with_adapter(BASE, ADAPTER)), (GRAPH, whole))
    )
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)


def test_several_are_one_of_the_sum_of_their_ranks():
    second = Lora(2, 7.0, ("q", "down"))
    added = drawn(abstract_adapter(SHAPE, second), 4)
    expected = merge_adapter(merge_adapter(BASE, ADAPTER, LORA), added, second)
    lora, adapter = stack_adapters(SHAPE, [(LORA, ADAPTER), (second, added)])
    assert (lora.rank, lora.scale, lora.targets) == (5, 1.0, PROJECTIONS)
    close(merge_adapter(BASE, adapter, lora), expected, rtol=1e-6)


# --- the steps

RECORD = optax.GradientTransformation(
    init=lambda params: jax.tree.map(jnp.zeros_like, params),
    update=lambda grads, state, params: (grads, grads),
)


def test_an_opd_step_scores_the_merged_student_and_keeps_moments_of_the_adapter_only():
    teacher, rng = drawn(abstract(SHAPE)[1], 5), np.random.default_rng(6)
    completions = rng.integers(1, 61, (3, 2, 5)).astype(np.int32)
    lengths = np.array([[5, 3], [2, 5], [4, 1]])
    logprobs = np.where(np.arange(5) < lengths[..., None], -rng.random((3, 2, 5)), 0).astype(np.float32)
    batch = OpdBatch(TOKENS, LENGTHS, Rollout(completions, logprobs, lengths))
    hyper = jax.tree.map(jnp.float32, Hyper(1.3, 5.0, 0.0, 0.0, 0.2))
    frozen = Frozen(teacher, BASE)

    def step(student_graph, params):
        graphs = Models(student=student_graph, teacher=GRAPH, base=GRAPH)
        run = make_opd_step(graphs, RECORD, Variant(), vocab=61, chunk=7, microbatch=1)
        return run(init_state(jax.tree.map(jnp.copy, params), RECORD), frozen, batch, hyper, jnp.float32(0.1))

    state, metrics, per_token = step(WITH, ADAPTER)
    _, whole_metrics, whole_per_token = step(GRAPH, merge_adapter(BASE, ADAPTER, LORA))
    metrics.pop("grad_norm"), whole_metrics.pop("grad_norm")
    close((metrics, per_token), (whole_metrics, whole_per_token), rtol=2e-5)
    assert jax.tree.structure(state.params) == jax.tree.structure(ADAPTER)
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == lora_params(SHAPE, LORA)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(state.opt_state))


def test_supervised_steps_teach_an_adapter_beside_its_frozen_base():
    rng, tx = np.random.default_rng(7), optax.scale_by_adam()
    batch = {
        "prompt": TOKENS,
        "prompt_length": LENGTHS,
        "answer": rng.integers(1, 61, (3, 4)).astype(np.int32),
    }
    batch["answer_length"] = np.array([4, 2, 3])
    step = make_sft_step(WITH, tx, 61, chunk=5, microbatch=1)
    state = init_state(initial_adapter(SHAPE, LORA, 0), tx)
    before, losses = jax.tree.map(np.array, BASE), []
    for _ in range(40):
        state, metrics = step(state, batch, jnp.float32(2e-2), BASE)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    bits(BASE, before)


# --- peft's folders


@pytest.fixture
def folder(tmp_path):
    """A base model and an adapter, in folders."""
    hf.save_hf(tmp_path / "base", SHAPE, BASE)
    hf.save_adapter(tmp_path / "adapter", LORA, ADAPTER, str(tmp_path / "base"))
    return tmp_path


def test_an_adapter_comes_back_bit_for_bit_and_is_not_replaced(folder):
    lora, adapter = hf.load_adapter(folder / "adapter", SHAPE)
    assert lora == LORA
    bits(adapter, ADAPTER)
    with pytest.raises(UserError, match="will not be replaced"):
        hf.save_adapter(folder / "adapter", LORA, ADAPTER, "base")


def test_peft_loads_ours(folder):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(TOKENS, dtype=torch.long)[:1]).logits.numpy()
    close(logits(WITH, with_adapter(BASE, ADAPTER))[:1], theirs, rtol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_what_peft_saves_is_merged_at_load(folder, rslora):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], use_rslora=rslora
    )
    model = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape) / 3)
    model.save_pretrained(folder / "theirs")
    section = config_module.defaults().student
    section.weights, section.adapter = str(folder / "base"), str(folder / "theirs")
    ours = dict(hf.hf_tensors(initial_params(section, model_config(section, 61), 0, "float32")))
    theirs = model.merge_and_unload().state_dict()
    for name, array in ours.items():
        close(array, theirs[name].numpy(), rtol=1e-6)


def test_the_weights_digest_counts_the_adapter(folder):
    section = config_module.defaults().student
    section.weights = str(folder / "base")
    without = weights_digest(section)
    section.adapter = str(folder / "adapter")
    assert weights_digest(section) != without


Q = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"

TENSOR_EDITS = {
    "unpaired": (lambda t: t.pop(Q), "must come in pairs"),
    "head": (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": t[Q]}), "lm_head.lora_A"),
    "embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": t[Q]}),
        "is none",
    ),
    "shape": (
        lambda t: t.update({Q: np.ones((3, 25), np.float32)}),
        r"q_lora_a of layer 1 has shape \(3, 25\)",
    ),
    "rank": (lambda t: t.update({Q: np.ones((4, 24), np.float32)}), r"asks for \(3, 24\)"),
    "nan": (lambda t: t.update({Q: t[Q] * np.nan}), "NaN or infinities"),
    "layer": (
        lambda t: t.update(
            {Q.replace("s.1", "s.2").replace("_A", f): t[Q.replace("_A", f)] for f in ("_A", "_B")}
        ),
        "q_proj of layer 2, which it lacks",
    ),
    "none": (lambda t: t.clear(), "must come in pairs"),
}


@pytest.mark.parametrize("edit", TENSOR_EDITS)
def test_broken_adapters_are_refused_by_name(folder, edit):
    change, says = TENSOR_EDITS[edit]
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    refused(folder, f"adapter_model.safetensors: .*{says}")


def refused(folder, says):
    with pytest.raises(UserError, match=says) as e:
        hf.load_adapter(folder / "adapter", SHAPE)
    assert "\n" not in str(e.value)


CONFIG_EDITS = [
    ({"peft_type": "IA3"}, "only LoRA"),
    ({"bias": "all"}, "only LoRA"),
    ({"use_dora": True}, "use_dora is not supported"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"r": 2.5}, "r=2.5"),
    ({"r": None}, "r=None"),
    ({"r": 2**30}, "asks for"),
    ({"lora_alpha": "big"}, "lora_alpha='big'"),
    ({"lora_alpha": -1}, "lora_alpha=-1"),
]


@pytest.mark.parametrize("change, says", CONFIG_EDITS)
def test_what_is_no_plain_lora_is_refused(folder, change, says):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(folder, says)


def test_absent_or_damaged_files_are_one_line(folder):
    path = folder / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    refused(folder, "not a complete safetensors file")
    path.unlink()
    refused(folder, "holds no adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text("[")
    path.write_bytes(b"")
    refused(folder, "adapter_config.json")
    shutil.rmtree(folder / "adapter")
    refused(folder, "holds no adapter_config.json")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"student.lora.rank": -1}, "student.lora.rank=-1"),
        ({"teacher.lora.alpha": 0.0}, "teacher.lora.alpha=0.0"),
        ({"student.lora.targets": "q_proj,k"}, "student.lora.targets='k' is unknown"),
        ({"student.lora.targets": ""}, "student.lora.targets='' is unknown"),
        ({"student.adapter": "a"}, "student.adapter=a: an adapter of what"),
    ],
)
def test_impossible_settings_are_one_line(fields, says):
    config = config_module.defaults()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=says):
        config_module.validate(config)


# --- a whole job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The config and workdir of a job that trained an adapter on a checkpoint, in SFT and by distillation."""
    folder = tmp_path_factory.mktemp("job")
    tokenizer = train_tokenizer([render_answer((1, 10))], 300, folder / "tokenizer")
    for seed, role in enumerate(("teacher", "student")):
        shape = ModelConfig(len(tokenizer), 16, 24, 1, 2, 1, 8)
        hf.save_hf(folder / role, shape, drawn(abstract(shape)[1], seed))
    config = config_module.defaults()
    config.data.synthetic.products, config.data.synthetic.reviews_per_product = 6, 8
    config.task.update(k=2, max_response=24, max_review_words=4, prompt_buckets=1)
    config.tokenizer.path = str(folder / "tokenizer")
    config.teacher.weights, config.student.weights = str(folder / "teacher"), str(folder / "student")
    config.student.lora.update(rank=2, alpha=4.0, targets="q_proj,v_proj,gate_proj,down_proj")
    config.sft.teacher.epochs = 0.0
    config.sft.student.update(steps=2, batch_size=2, lr=1e-2)
    config.opd.update(lambdas=(1.0,), steps=2, batch_size=2, lr=1e-2)
    config.evaluation.update(batch_size=8, bootstrap=20)
    config.evaluation.forgetting = True
    config.train.checkpoint_every = 1
    config = config_module.validate(config)
    run_stages(config, folder / "workdir")
    (folder / "workdir" / "config.json").write_text(json.dumps({"config": config_module.to_json(config)}))
    return config, folder / "workdir"


POLICY = "opd_lambda1.0_seed0"


def whole(folder):
    return dict(hf.hf_tensors(hf.load_hf(folder)[1]))


def test_only_the_targets_of_the_student_moved(job):
    config, workdir = job
    start, sft, opd = (
        whole(f)
        for f in (config.student.weights, workdir / "export/sft_student", workdir / f"export/{POLICY}")
    )
    for before, after in ((start, sft), (sft, opd)):
        moved = {name.split(".")[-2] for name in before if not np.array_equal(before[name], after[name])}
        assert moved == {"q_proj", "v_proj", "gate_proj", "down_proj"}


def test_a_run_resumes_from_its_adapter(job, tmp_path):
    config, workdir = job
    again = shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / POLICY / "2")
    shutil.rmtree(again / "export")
    records = json.loads((again / "results.json").read_text())
    kept = [r for r in records if r["stage"] != "opd"]
    assert len(kept) == len(records) - 1
    (again / "results.json").write_text(json.dumps(kept))
    run_stages(config, again)
    bits(whole(again / "export" / POLICY), whole(workdir / "export" / POLICY))


def test_what_is_forgotten_is_measured_and_reported(job):
    """Against transformers' loss of the exported policy; KL to the base is above zero once a policy has moved."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, workdir = job
    found = {
        r.run: r.extra["forgetting"] for r in read_results(workdir / "results.json") if r.stage != "forecast"
    }
    assert found.keys() == {"sft_teacher", "sft_student", POLICY}
    for name, measured in found.items():
        folder = workdir / "export" / name
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        nats = count = 0
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
            with torch.no_grad():
                nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        assert measured["perplexity"] == pytest.approx(np.exp(nats / count), rel=1e-4)
    assert found[POLICY]["kl_to_base"] > 0 and "kl_to_base" not in found["sft_student"]
    page = write_report(workdir).read_text()
    assert "What is forgotten" in page and "KL to the base" in page


@pytest.mark.parametrize("policy", ["sft_student", POLICY])
def test_it_is_exported_merged_from_its_checkpoints_and_as_an_adapter(job, tmp_path, policy, capsys):
    config, workdir = job
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "export")
    flags = [f"--workdir={copy}", f"--policy={policy}"]
    assert exit_code(export_main, [*flags, f"--out={tmp_path / 'whole'}"]) == 0, capsys.readouterr().err
    exported = whole(workdir / "export" / policy)
    bits(whole(tmp_path / "whole"), exported)
    out = tmp_path / "adapter"
    assert exit_code(export_main, [*flags, f"--out={out}", "--adapter"]) == 0, capsys.readouterr().err
    lora, adapter = hf.load_adapter(out, hf.read_config(workdir / "export" / policy))
    assert lora.rank == (2 if policy == "sft_student" else 4)
    params = merge_adapter(hf.load_hf(config.student.weights)[1], adapter, lora)
    close(dict(hf.hf_tensors(params)), exported, rtol=1e-6)
    assert (
        json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
        == config.student.weights
    )
    assert (out / "tokenizer.json").exists() and "## How it was made" in (out / "README.md").read_text()


def test_an_adapter_that_is_not_there_is_one_line(job, tmp_path, capsys):
    _, workdir = job
    copy = shutil.copytree(workdir, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints" / "sft_student")
    flags = [f"--workdir={copy}", f"--out={tmp_path / 'out'}", "--adapter"]
    for policy, says in ((POLICY, "has no checkpoints/sft_student"), ("sft_teacher", "was trained in full")):
        assert exit_code(export_main, [*flags, f"--policy={policy}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line and not (tmp_path / "out").exists()
