"""Hugging Face checkpoints in and out: the only place that knows their names, shapes and config.json."""

from listopd_jax.models.hf.adapter import adapter_files, load_adapter, save_adapter
from listopd_jax.models.hf.config import read_config, read_eos_ids, resolve
from listopd_jax.models.hf.load import check_hf, load_hf
from listopd_jax.models.hf.save import hf_tensors, save_hf

__all__ = [
    "adapter_files",
    "check_hf",
    "hf_tensors",
    "load_adapter",
    "load_hf",
    "read_config",
    "read_eos_ids",
    "resolve",
    "save_adapter",
    "save_hf",
]
