"""Says a plan: for each topic the choice, its reason, what it is predicted to gain, and what was rejected and why."""

from collections.abc import Mapping
from typing import NamedTuple

from hf_kvopt.plan.inputs import show_bytes
from hf_kvopt.plan.options import Option, Times
from hf_kvopt.plan.setup import Setup
from hf_kvopt.plan.steps import MOST_SPEEDUP

Timed = Mapping[Option, Times]


class Choice(NamedTuple):
    """One decision in words: what about, what was chosen, why, what it should gain, and what was not chosen and why."""

    topic: str
    choice: str
    reason: str
    gain: str  # predicted
    rejected: tuple[str, ...]


def explain(
    setup: Setup, best: Option, timed: Timed, default: Times, num_devices: int, block_size: int, head: bool
) -> tuple[Choice, ...]:
    """Return one choice a topic."""
    return (
        _attention(setup),
        _cache(setup, best, timed, default),
        _format(setup, best, timed),
        _block_size(setup, best, block_size),
        _prefix(setup, best, timed),
        _speculation(setup, best, timed, head),
        _compile(setup, best, timed),
        _parallelism(setup, best, num_devices),
    )


def _attention(setup: Setup) -> Choice:
    if not setup.takes_attention:
        reason = "this model's attention is written into it, or picks single keys: ours cannot be chosen"
        return Choice("attention", "the model's own", reason, "none: the cache is gathered", ())
    reason = "reads blocks in place and builds no [q, kv] mask"
    rejected = ("sdpa over a paged cache: gathers every key and value at each step",)
    return Choice("attention", "hf_kvopt", reason, "part of the cache's gain", rejected)


def _cache(setup: Setup, best: Option, timed: Timed, default: Times) -> Choice:
    plain = timed.get(Option("native", False, False, "none"))
    copied, tokens = 2 * setup.kv("native"), f"{setup.batch * setup.context:,} tokens"
    gain = "native blocks alone do not fit" if plain is None else f"step {_versus(default.step_s, plain.step_s)}"
    rejected = (f"DynamicCache: torch.cat moves {show_bytes(copied)} more at each step, and doubles a layer's peak",)
    if best.is_compiled:
        return Choice("cache", f"paged, fixed at {tokens}", "a graph needs fixed addresses", gain, rejected)
    reason = f"blocks, capped at {tokens} a batch so that nothing is reserved ahead"
    return Choice("cache", "paged", reason, gain, (*rejected, "StaticCache: no sharing, no formats, no crop by rows"))


def _format(setup: Setup, best: Option, timed: Timed) -> Choice:
    native, rejected = setup.kv("native"), []
    for name in setup.formats:
        if name == best.format:
            continue
        peer = best._replace(format=name)
        size = f"{show_bytes(setup.kv(name))} of KV"
        if peer not in timed:
            rejected.append(f"{name}: {size} do not fit beside the weights")
        else:
            saved = 1 - timed[peer].request_s / timed[best].request_s
            said = f"saves {saved:.1%} of a request" if saved > 0 else f"takes {abs(saved):.1%} longer"
            rejected.append(f"{name}: {size}, {said}" + (": not worth the loss" if saved > 0 else ""))
    rejected.append(_fp8(setup))
    kept = f"{show_bytes(setup.kv(best.format))} of KV, native {show_bytes(native)}"
    if best.format == "native":
        share = f"KV is {_kv_share(setup):.0%} of the bytes that a step reads"
        reason = (
            f"{share}: less of it changes little" if setup.device.is_gpu else f"{share}, but a CPU pays for unpacking"
        )
        return Choice("format", "native", reason, f"no loss; {kept}", tuple(rejected))
    fits = best._replace(format="native") in timed
    reason = "the weights leave no room for native KV" if not fits else "KV is most of what a step reads"
    gain = kept if not fits else f"{kept}; {_versus(timed[best._replace(format='native')].step_s, timed[best].step_s)}"
    if best.format in MOST_SPEEDUP and setup.device.is_gpu:
        gain += f" (reading is taken as at most {MOST_SPEEDUP[best.format]}x faster, by instruction counts)"
    return Choice("format", best.format, reason, gain, tuple(rejected))


def _fp8(setup: Setup) -> str:
    needs = setup.device.capability
    if setup.device.is_gpu and needs is not None and needs < (8, 9):
        return f"fp8_e4m3: needs compute capability 8.9, {setup.device.name} has {needs[0]}.{needs[1]}; int8 instead"
    saved = f"at {setup.batch} x {setup.context:,} tokens it saves at most {_kv_share(setup) / 2:.1%} of a step's bytes"
    return f"fp8_e4m3: the bytes of int8 with three times its measured loss; {saved}"


def _kv_share(setup: Setup) -> float:
    native = setup.kv("native")
    return native / (native + setup.weights.bytes_read(setup.batch))


def _block_size(setup: Setup, best: Option, block_size: int) -> Choice:
    slack = (block_size - 1) / 2 / setup.context
    if block_size == 16:
        reason = "small blocks share and waste best"
        rejected = ("64: a few instructions less a block, a prefix shared in coarser steps",)
    else:
        reason = "long rows and nothing shared: a quarter of the table entries"
        rejected = ("16: four times the entries for every row's table, for no memory worth naming",)
    return Choice("block size", str(block_size), reason, f"mean slack {slack:.2%} of a row", rejected)


def _prefix(setup: Setup, best: Option, timed: Timed) -> Choice:
    peer = best._replace(shares_prefix=not best.shares_prefix)
    if best.shares_prefix:
        gain = "first token " + _versus(timed[peer].first_token_s, timed[best].first_token_s)
        reason = f"{setup.work.seen_share:.0%} of a {setup.workload} prompt is taken as seen before"
        return Choice("prefix sharing", "on", reason, gain, ("off: computes the same beginnings again",))
    if setup.work.seen_share == 0:
        reason = "unrelated prompts have no beginning in common"
    elif setup.has_states:
        reason = "this model has recurrent states, which cannot be shared by blocks"
    elif best.is_compiled:
        reason = "a cache of fixed addresses shares nothing, and the compiled step saves more"
    else:
        reason = "encoder-decoder prompts are not shared"
    return Choice("prefix sharing", "off", reason, "none", ())


def _speculation(setup: Setup, best: Option, timed: Timed, head: bool) -> Choice:
    plain = best._replace(draft="none")
    if best.draft != "none":
        ours, other = timed[best], timed[plain]
        per_token = _versus(other.step_s, ours.step_s / ours.accepted)
        gain = f"{per_token} a token, {ours.accepted:g} accepted a step (published)"
        return Choice("speculation", best.draft, "few rows leave the arithmetic idle while weights are read", gain, ())
    if setup.goal == "throughput" or setup.batch > 8:
        reason = f"{setup.batch} rows use the arithmetic already, drafts would take it from other rows"
    elif setup.has_states:
        reason = "recurrent states cannot be cut back to what was accepted"
    elif best.is_compiled:
        reason = "a compiled step saves more; both at once are not supported"
    else:
        reason = "no head at hand, and the output does not copy from its prompt" if not head else "predicted to lose"
    tried = [option for option in timed if option.draft != "none" and option.format == best.format]
    rejected = [
        f"{o.draft}{' on shared prefixes' * o.shares_prefix}: {timed[o].request_s:.3g} s a request against "
        f"{timed[best].request_s:.3g} s"
        for o in tried
    ]
    if not head and setup.goal == "latency" and setup.batch <= 8:
        rejected.append("a trained head (EAGLE-3: published 3.0x at batch 1): none given; pass --head if there is one")
    return Choice("speculation", "off", reason, "none", tuple(rejected))


def _compile(setup: Setup, best: Option, timed: Timed) -> Choice:
    graph = Option(best.format, True, False, "none")
    eager = Option(best.format, False, False, "none")
    if not setup.device.is_gpu:
        return Choice(
            "compile", "off", "no launches to save on a CPU", "none", ("on: minutes of compiling for no gain",)
        )
    if graph not in timed:
        return Choice("compile", "off", "recurrent states are not in fixed memory", "none", ())
    said = f"step {_versus(timed[eager].step_s, timed[graph].step_s)}"
    if best.is_compiled:
        reason = "the eager step waits for launches from the host"
        return Choice("compile", "on", reason, said + " (published host times)", ("eager: the device idles",))
    won = f"{timed[graph].request_s:.3g} s a request against {timed[best].request_s:.3g} s"
    return Choice(
        "compile", "off", "sharing, drafts or longer reads save more here", "none", (f"on: {said}, but {won}",)
    )


def _parallelism(setup: Setup, best: Option, num_devices: int) -> Choice:
    if num_devices > 1:
        reason = f"weights and KV need {show_bytes(setup.weights.num_bytes + setup.kv(best.format))}"
        rejected = (
            f"one device: holds {show_bytes(setup.budget)}",
            "device_map='auto': fits too, but one device works at a time",
        )
        return Choice("parallelism", f"tensor parallel over {num_devices}", reason, "traffic not counted", rejected)
    fits = setup.num_devices("native") == 1
    reason = "everything fits on one device" if fits else f"{best.format} makes it fit on one device"
    room = f"up to {setup.largest_batch(best.format, 1):,} rows of {setup.context:,} tokens"
    return Choice("parallelism", "none", reason, room, ("more devices: not needed to fit",))


def _versus(before: float, after: float) -> str:
    """`before` to `after` in milliseconds, with the ratio."""
    return f"{before * 1e3:.3g} -> {after * 1e3:.3g} ms ({before / after:.2f}x)"
