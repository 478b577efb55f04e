"""Explanation of the choices about memory: attention, cache, format, block size, devices."""

from hf_kvopt.plan.inputs import show_bytes
from hf_kvopt.plan.layout import why_not_divided
from hf_kvopt.plan.options import COPIES, Option, dynamic_bytes, read_bytes, step_model
from hf_kvopt.plan.setup import seals
from hf_kvopt.plan.steps import MOST_SPEEDUP, Step
from hf_kvopt.plan.weighing import WORTH_A_LOSS, Choice, Weighing, ms, plain, versus


def attention(w: Weighing) -> Choice:
    """Explain which attention reads the cache."""
    setup, kind = w.setup, w.best._replace(format="native", shares_prefix=False, draft="none")
    size, steps = read_bytes(setup, kind), step_model(setup, w.layout)
    rows = setup.batch, setup.context, size
    gathered = steps.decode(*rows, copies=COPIES, is_compiled=kind.is_compiled, expands=setup.has_latents)
    if not setup.takes_attention:
        reason = "this model's attention is written into it, or picks single keys: ours cannot be chosen"
        gain = f"none: each step gathers {show_bytes(size)} of keys and values"
        return Choice("attention", "the model's own", reason, gain, ())
    ours = steps.decode(*rows, is_compiled=kind.is_compiled, expands=setup.expands(1))
    reason = "reads blocks in place and builds no [q, kv] mask"
    if setup.has_latents:
        reason = "builds no [q, kv] mask, and reads latents as they lie instead of expanding them"
    if setup.expands(1):
        reason = "builds no [q, kv] mask; latents are expanded at each step: the projection to absorb is quantized"
    rejected = (f"sdpa over a paged cache: gathers {show_bytes(size)} of keys and values at each step",)
    gain = f"step {versus(gathered.seconds, ours.seconds)} against gathering{_waits(ours, gathered)}"
    return Choice("attention", "hf_kvopt", reason, gain, rejected)


def cache(w: Weighing) -> Choice:
    """Explain which cache is used, and how much of it `max_tokens` allows."""
    held, blocks = w.held[w.best], plain("native")
    tokens, most = f"{held.max_tokens:,} tokens", show_bytes(held.most_bytes)
    if blocks in w.timed:
        step, default = w.timed[blocks].step, w.default.step
        gain = f"native blocks and attention alone: step {versus(default.seconds, step.seconds)}{_waits(step, default)}"
    else:
        gain = f"native blocks, {show_bytes(w.misfit(blocks))}, do not fit"
    rejected = [_torch_cat(w)]
    if w.best.is_compiled:
        reason = f"a graph needs fixed addresses: {most} from the start"
        return Choice("cache", f"paged, fixed at {tokens}", reason, gain, tuple(rejected))
    rejected.append("StaticCache: no sharing, no formats, no crop by rows")
    if w.best.shares_prefix:
        batches = f"{held.batches} batches" if held.batches > 1 else "one batch"
        reason = f"a store for {batches} of this size, {most} at most"
        return Choice("cache", f"paged, a store capped at {tokens}", reason, gain, tuple(rejected))
    reason = f"one batch of this size, {most} at most: nothing is reserved beyond it"
    return Choice("cache", f"paged, capped at {tokens}", reason, gain, tuple(rejected))


def _waits(ours: Step, other: Step) -> str:
    """Name the common limit of two steps of equal time; "" if their times differ."""
    is_same = abs(ours.seconds - other.seconds) < 0.005 * other.seconds
    return f": both wait for {ours.limit}" if is_same and ours.limit == other.limit else ""


def _torch_cat(w: Weighing) -> str:
    """State the cost of DynamicCache's copies in a step, which may be hidden behind another limit."""
    held, step = dynamic_bytes(w.setup), w.default.step
    bare = step_model(w.setup, w.layout).decode(w.setup.batch, w.setup.context, held, expands=w.setup.has_latents)
    moved = f"DynamicCache: torch.cat moves {show_bytes(2 * held)} more at each step"
    taken, added = step.bytes_s - bare.bytes_s, step.seconds - bare.seconds
    if added < 0.005 * step.seconds:
        cost = f"{ms(taken)} that pass while the step waits {ms(step.seconds)} for {step.limit}"
    elif added < 0.995 * taken:
        cost = f"{ms(taken)}, which make the step {ms(added)} longer"
    else:
        cost = f"{ms(taken)} of the step's {ms(step.seconds)}"
    return f"{moved}: {cost}; and it doubles a layer's peak"


def format(w: Weighing) -> Choice:
    """Explain how keys and values are stored."""
    best, native = w.best, w.best._replace(format="native")
    rejected = (*(_other_format(w, name) for name in w.setup.formats if name != best.format), _float8(w))
    kept = show_bytes(w.held[best].batch_bytes)
    if best.format == "native":
        return Choice("format", "native", _why_native(w), f"no loss; {kept} of KV", rejected)
    if native not in w.timed:
        size = show_bytes(w.misfit(native))
        reason = (
            f"{size} of native KV{_kind(best)} do not fit beside {show_bytes(w.setup.weights.num_bytes)} of weights"
        )
        others = [option for option in w.timed if option.format == "native"]
        if others:
            reason += f"; what fits takes {w.request_of(min(others, key=lambda option: w.timed[option].request_s))}"
        return Choice("format", best.format, reason, f"{kept} of KV instead of {size}", rejected)
    size, step = show_bytes(w.held[native].batch_bytes), w.timed[best].step
    saved = 1 - w.request_s / w.timed[native].request_s
    reason = (
        f"KV is {_kv_share(w):.0%} of the KV and weights that a native step reads: {best.format} saves {saved:.1%} of "
        f"a request, and {WORTH_A_LOSS:.0%} make up for a loss"
    )
    gain = f"{kept} of KV instead of {size}; step {versus(w.timed[native].step.seconds, step.seconds)}"
    most = MOST_SPEEDUP.get(best.format)
    if most is not None:
        gain += f"; keys and values are read at most {most}x faster, by instruction counts"
    return Choice("format", best.format, reason, gain, rejected)


def _why_native(w: Weighing) -> str:
    step, share = w.timed[w.best].step, f"KV is {_kv_share(w):.0%} of the KV and weights that a step reads"
    if not w.setup.device.is_gpu:
        return f"{share}; on a CPU formats are timed like native, so they give memory alone"
    if step.limit != "memory":
        return f"{share}, but the step waits {ms(step.seconds)} for {step.limit}: fewer bytes save nothing"
    saved = max(w.saving(option) for option in w.timed if option._replace(format="native") == w.best)
    return f"{share}: a format saves at most {saved:.1%} of a request, and {WORTH_A_LOSS:.0%} make up for a loss"


def _other_format(w: Weighing, name: str) -> str:
    peer = w.best._replace(format=name)
    if peer not in w.timed:
        return f"{name}: {show_bytes(w.misfit(peer))} of KV{_kind(peer)} do not fit beside the weights"
    size, saved = f"{name}: {show_bytes(w.held[peer].batch_bytes)} of KV", w.saving(peer)
    if abs(saved) < 0.0005:
        return f"{size}, no faster"
    if saved < 0:
        return f"{size}, takes {-saved:.1%} longer"
    return f"{size}, saves {saved:.1%} of a request, where {WORTH_A_LOSS:.0%} would make up for a loss"


def _kind(option: Option) -> str:
    """Name the kind of cache that holds the keys and values; "" for a growing one."""
    return " at fixed addresses" if option.is_compiled else " in a store" if option.shares_prefix else ""


def _float8(w: Weighing) -> str:
    """State why float8 was rejected: it takes the bytes of int8 with more loss, or the device cannot run it."""
    device, needs = w.setup.device, (8, 9)
    if device.is_gpu and device.capability is not None and device.capability < needs:
        has = f"{device.name} has {device.capability[0]}.{device.capability[1]}"
        return f"fp8_e4m3: needs compute capability {needs[0]}.{needs[1]}, {has}"
    return "fp8_e4m3: the bytes of int8, with more loss"


def _kv_share(w: Weighing) -> float:
    """Return the share of keys and values in the bytes that a native step of the chosen kind reads."""
    read = w.best._replace(format="native", shares_prefix=False, draft="none")
    kv = read_bytes(w.setup, read) / w.layout.kv_parts
    divisor = w.layout.count if w.layout.is_divided else 1
    return kv / (kv + w.setup.weights.bytes_read(w.setup.batch, divisor))


def block_size(w: Weighing) -> Choice:
    """Explain how many tokens a block has."""
    size, context = w.held[w.best].block_size, w.setup.context
    gain = f"half a block unused a row in the mean, {(size - 1) / 2 / context:.2%} of it"
    blocks = {n: f"{-(-context // n):,} blocks of {n}" for n in (16, 64)}
    if seals(w.best.format):
        return Choice("block size", str(size), f"{w.best.format} seals whole blocks of {size}", gain, ())
    if size == 64:
        reason = f"rows of {context:,} tokens have {blocks[64]}, and nothing is shared by blocks"
        return Choice("block size", "64", reason, gain, (f"16: {blocks[16]}, a longer table",))
    if w.best.shares_prefix:
        return Choice("block size", "16", "prefixes are shared in steps of a block", gain, ("64: coarser steps",))
    reason = f"rows of {context:,} tokens have {blocks[16]}: a short table"
    return Choice("block size", "16", reason, gain, (f"64: {63 / 2 / context:.2%} of a row unused in the mean",))


def parallelism(w: Weighing) -> Choice:
    """Explain how many devices are used, and how the model is placed on them."""
    setup, count = w.setup, w.layout.count
    rows = f"up to {w.largest_batch:,}" if w.largest_batch is not None else "any number of"
    room = f"{rows} rows of {setup.context:,} tokens fit"
    needed = f"weights and KV need {show_bytes(setup.weights.num_bytes + w.held[w.best].most_bytes)}"
    if count == 1:
        return Choice("parallelism", "none", f"{needed}, the device holds {show_bytes(setup.budget)}", room, ())
    reason = f"{needed}, one device holds {show_bytes(setup.budget)}"
    if w.layout.is_divided:
        whole = "" if w.layout.divides_kv else "; each device keeps all keys and values"
        gain = f"{room}{whole}; traffic between devices is not counted"
        rejected = ("layers spread by device_map='auto': one device works at a time",)
        return Choice("parallelism", f"tensor parallel over {count}", reason, gain, rejected)
    reasons = (why_not_divided(setup.weights, setup.layers, n) for n in (2, 4, 8))
    why = next((why for why in reasons if why is not None), "its parts that lie whole on each device do not fit")
    gain = f"{room}; no time: one device works at a time"
    return Choice("parallelism", f"layers spread over {count}", reason, gain, (f"tensor parallelism: {why}",))
