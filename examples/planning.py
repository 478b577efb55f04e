"""Planning before anything is loaded: KV memory by format, the capacity of a device, and the settings to choose.

Run `python examples/planning.py` (the bundled config, no network), or with `--model HUB_ID --device H200`; of a hub id
only the config is downloaded. On the command line: `python -m hf_kvopt memory ...` and `... plan ...`.
"""

import argparse
from pathlib import Path

import hf_kvopt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(Path(__file__).parents[1] / "evals/reference_model/model"))
parser.add_argument("--device", default="RTX4090", help=f"cpu, auto or one of {', '.join(hf_kvopt.plan.DEVICES)}")
parser.add_argument("--context", default="8k")
parser.add_argument("--batch", type=int, default=16)
args = parser.parse_args()
show = hf_kvopt.plan.show_bytes

# How large is the cache, by format? 32k means 32 x 1,024 tokens, "24GiB" 24 x 1,024^3 bytes.
print(f"{args.batch} rows of {args.context} tokens:")
for format in ("native", "int8", "k8v4", "int4"):
    size = hf_kvopt.plan.memory(args.model, context=args.context, batch=args.batch, format=format)
    print(f"  {format:8} {show(size.used_bytes):>10}, {size.bytes_per_token:,} bytes a token")

# Capacity of a device beside the weights.
report = hf_kvopt.plan.memory(args.model, context=args.context, batch=args.batch, device=args.device)
room = report.capacity
print(f"beside {show(report.weight_bytes)} of weights on {args.device}:")
print(f"  {room.max_context:,} tokens a row at batch {args.batch}, or {room.max_batch:,} rows of {args.context}")

# Settings to use, with reasons and the expected gain.
plan = hf_kvopt.plan.plan(
    args.model, device=args.device, context=args.context, batch=args.batch, workload="agent", goal="throughput"
)
print("choose:")
for choice in plan.choices:
    print(f"  {choice.topic}: {choice.choice}, because {choice.reason}")
print(f"predicted: {plan.predicted.gain:.1f}x of the default's speed for a whole request. Do it:\n")
print("\n".join(plan.code))
