"""Tiny models whose weights lie elsewhere than in the memory of the device that computes, made as users make them."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, PreTrainedModel

CPU = torch.device("cpu")


def load(folder: Path, **kwargs: object) -> PreTrainedModel:
    """Load the model of a folder with eager attention; no token ends its texts."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **kwargs).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def device_map(model: PreTrainedModel) -> dict[str, str]:
    """Return a map with the first half of the layers in CPU memory and the rest of the model on a disk.

    A head that shares the weights of the embeddings stays with them: accelerate finds no such weights on a disk.
    """
    num_layers = len(model.model.layers)
    layers = {f"model.layers.{i}": "cpu" if i < num_layers / 2 else "disk" for i in range(num_layers)}
    head = "cpu" if model.config.tie_word_embeddings else "disk"
    return {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", **layers, "model.norm": "disk", "lm_head": head}


def mapped(folder: Path, scratch: Path) -> PreTrainedModel:
    """Load over memory and disk by `device_map`."""
    return load(folder, device_map=device_map(load(folder)), offload_folder=scratch)


def on_disk(folder: Path, scratch: Path) -> PreTrainedModel:
    """Load with all weights on a disk, and no parameter in memory."""
    return disk_offload(load(folder), scratch, CPU)


def in_memory(folder: Path, scratch: Path) -> PreTrainedModel:
    """Load with all weights in CPU memory, brought to the device by accelerate's hooks."""
    return cpu_offload(load(folder), CPU)


def dispatched(folder: Path, scratch: Path) -> PreTrainedModel:
    """Load, and dispatch over memory and disk."""
    model = load(folder)
    return dispatch_model(model, device_map(model), main_device="cpu", offload_dir=scratch)


PLACEMENTS: dict[str, Callable[[Path, Path], PreTrainedModel]] = {
    "device map": mapped,
    "cpu_offload": in_memory,
    "disk_offload": on_disk,
    "dispatch_model": dispatched,
}
