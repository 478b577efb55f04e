"""Setup of a training run: a fresh head that fits the target, and its optimizers."""

import argparse

import torch
from transformers import PreTrainedModel

from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.heads.config import EagleConfig, MedusaConfig
from hf_kvopt.speculation.heads.eagle import EagleHead, draft_vocab_of
from hf_kvopt.speculation.heads.medusa import MedusaHead
from hf_kvopt.speculation.training.data import TokenRows, count_tokens


def make_head(args: argparse.Namespace, target: PreTrainedModel, rows: TokenRows) -> HeadBase:
    """Return a fresh head for `target`, initialized with its LM head; counts tokens to choose the draft vocabulary."""
    text = target.config.get_text_config(decoder=True)
    vocab = min(args.draft_vocab or 32000, text.vocab_size)
    lm_weight = target.get_output_embeddings().weight
    if any(layer >= text.num_hidden_layers for layer in args.layers or ()):
        raise ValueError(
            f"target_layer_ids must be below the target's {text.num_hidden_layers} layers, or -1 for its last hidden "
            f"state: got --layers {args.layers}"
        )
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
                target_layer_ids=args.layers if is_3 else None,
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
        head.set_draft_vocab(draft_vocab_of(count_tokens(rows, 2048, text.vocab_size), vocab))
    ids = head.to_target(torch.arange(vocab, device=lm_weight.device)) if head.d2t is not None else slice(None)
    with torch.no_grad():
        if isinstance(head, EagleHead) and head.lm_head is not None:
            head.lm_head.weight.copy_(lm_weight[ids])
        if isinstance(head, MedusaHead) and head.lm_weight is not None:
            head.lm_weight.copy_(lm_weight[ids].expand_as(head.lm_weight))
    return head


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
