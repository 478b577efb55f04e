"""Setup of a training run: presets, the target, a fresh head that fits it, and its optimizers."""

import argparse
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.heads.config import EagleConfig, MedusaConfig
from hf_kvopt.speculation.heads.eagle import EagleHead, default_layers, draft_vocab_of
from hf_kvopt.speculation.heads.medusa import MedusaHead

PRESETS: dict[str, dict[str, Any]] = {
    # An hour of two CPU cores for a target of 135 M parameters: the target runs once over each row, in bfloat16.
    "cpu": {
        "write": 300_000, "keep_features": True, "steps": 3, "draft_vocab": 4096, "intermediate_size": 1024,
        "shared_lm_head": True, "row_len": 384, "batch_size": 8, "max_steps": 500, "optimizer": "muon", "lr": 3e-3,
        "mixed_precision": "bf16", "dtype": "bfloat16", "save_dtype": "bfloat16", "save_every": 50, "eval_every": 50,
        "cpu": True,
    },
    # As the authors of EAGLE-3 train: seven steps, long rows, an LM head of its own; features are not kept.
    "gpu": {
        "steps": 7, "draft_vocab": 32_000, "row_len": 2048, "batch_size": 8, "max_steps": 20_000, "optimizer": "adamw",
        "lr": 1e-4, "mixed_precision": "bf16", "dtype": "bfloat16", "save_dtype": "bfloat16", "compile": True,
        "save_every": 500, "eval_every": 500,
    },
}  # fmt: skip
"""Defaults of the command line by preset; what is given beside `--preset` wins."""


def feature_layers(args: argparse.Namespace, target: PreTrainedModel) -> tuple[int, ...]:
    """Return the hidden states of the target that the head will read.

    Raises:
        ValueError: the target has no such layer.
    """
    num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
    if args.head != "eagle3":
        return (-1,)
    if args.layers is None and args.preset == "cpu":
        # The final hidden state knows the next token best, which a short training needs to be told.
        return (min(2, num_layers), num_layers // 2, -1)
    layers = tuple(args.layers) if args.layers is not None else default_layers(num_layers)
    if args.layers is None and num_layers < 4:
        raise ValueError(
            f"EAGLE-3 reads layers 2, n // 2, n - 3 of at least 4 layers: got {num_layers}; name others with --layers"
        )
    if any(not -1 <= layer < num_layers for layer in layers):
        raise ValueError(
            f"target_layer_ids must be below the target's {num_layers} layers, or -1 for its last hidden state: got "
            f"--layers {list(layers)}"
        )
    return layers


def make_head(args: argparse.Namespace, target: PreTrainedModel, counts: Tensor) -> HeadBase:
    """Return a fresh head for `target`, initialized with its LM head.

    Args:
        args: arguments of the command line.
        target: the model.
        counts: [vocab_size] int64: how often each token occurs, to choose the draft vocabulary.
    """
    text = target.config.get_text_config(decoder=True)
    vocab = min(args.draft_vocab or 32000, text.vocab_size)
    common = {"vocab_size": text.vocab_size, "hidden_size": text.hidden_size, "dtype": torch.float32}
    head: HeadBase
    if args.head == "medusa":
        head = MedusaHead(
            MedusaConfig(
                **common,
                draft_vocab_size=0 if args.shared_lm_head else vocab,
                medusa_num_heads=args.steps,
                medusa_num_layers=args.medusa_layers,
                shared_lm_head=args.shared_lm_head,
            )
        )
    else:
        is_3 = args.head == "eagle3"
        head = EagleHead(
            EagleConfig(
                **common,
                eagle_version=3 if is_3 else 1,
                draft_vocab_size=vocab if is_3 else 0,
                target_layer_ids=feature_layers(args, target),
                own_lm_head=not args.shared_lm_head,
                intermediate_size=args.intermediate_size or text.intermediate_size,
                num_attention_heads=text.num_attention_heads,
                num_key_value_heads=text.num_key_value_heads,
                head_dim=getattr(text, "head_dim", None) or 0,
                max_position_embeddings=text.max_position_embeddings,
                rope_parameters=text.rope_parameters,
                rms_norm_eps=text.rms_norm_eps,
                hidden_act=text.hidden_act,
            )
        )
    if head.d2t is not None:
        head.set_draft_vocab(draft_vocab_of(counts, vocab))
    _initialize(head, target)
    return head


@torch.no_grad()
def _initialize(head: HeadBase, target: PreTrainedModel) -> None:
    """Copy the rows of the target's LM head, and its final norm if that is one of the head's kind."""
    lm_weight = target.get_output_embeddings().weight
    ids: Any = slice(None)
    if head.d2t is not None:
        ids = head.to_target(torch.arange(len(head.d2t))).to(lm_weight.device)
    if isinstance(head, MedusaHead) and head.lm_weight is not None:
        head.lm_weight.copy_(lm_weight[ids].expand_as(head.lm_weight))
    if not isinstance(head, EagleHead):
        return
    if head.lm_head is not None:
        head.lm_head.weight.copy_(lm_weight[ids])
    if head.norm is not None and head.feature_layers[-1:] == (-1,) and head.fc.in_features % len(head.norm.weight) == 0:
        _begin_as_identity(head, target)


def _begin_as_identity(head: EagleHead, target: PreTrainedModel) -> None:
    """Let a head that reads the final hidden state last return it at first, at the scale that the LM head expects.

    On SmolLM2-135M the loss after 28 steps of 1,536 tokens was 14.4 instead of 18.8 (held-out rows).
    """
    layer: Any = head.layers[0]
    hidden = head.config.hidden_size
    head.fc.weight[:, -hidden:] = torch.eye(hidden)
    head.fc.weight[:, :-hidden] *= 0.3
    layer.o_proj.weight.zero_()
    layer.down_proj.weight.zero_()
    # A normed state has the size of its norm's weight, whatever is added to that (Gemma's norms add 1).
    final: Any = getattr(target.base_model, "norm", None)
    if head.norm is not None and final is not None:
        x = torch.randn(64, target.config.get_text_config(decoder=True).hidden_size, dtype=target.dtype)
        head.norm.weight.fill_(final(x.to(target.device)).float().pow(2).mean().sqrt().item())


def make_optimizers(head: HeadBase, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Return AdamW for all weights, or Muon for matrices other than embeddings and LM heads and AdamW for the rest."""
    named = [(n, p) for n, p in head.named_parameters() if p.requires_grad]
    rest = [p for n, p in named if args.optimizer == "adamw" or p.ndim != 2 or "embed" in n or "lm_head" in n]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if args.optimizer == "muon":
        taken = {id(p) for p in rest}
        matrices = [p for _, p in named if id(p) not in taken]
        optimizers.append(torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return optimizers
