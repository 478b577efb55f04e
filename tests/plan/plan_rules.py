"""Rules for each sentence that `plan` prints, checked against the figures of the plan and of `memory`."""

import copy
from functools import cached_property
from typing import Any

import torch

from hf_kvopt.plan import WORKLOADS, MemoryReport, Plan, memory
from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.model_config import load_config
from hf_kvopt.plan.options import Option
from hf_kvopt.plan.planner import Weighed
from hf_kvopt.plan.steps import MEMORY_SHARE, MOST_SPEEDUP
from hf_kvopt.plan.weights import Weights, count_weights
from hf_kvopt.quant import KV_FORMATS
from tests.plan.pages import Rule, near, number, same_bytes, same_seconds, same_versus, seconds, size_of

LOSS = 0.05  # share of a request that a lossy format must save


def is_sealed(format: str) -> bool:
    """Return whether a format seals whole blocks, of 64 tokens."""
    return KV_FORMATS[format].sealed is not None


class Facts:
    """Figures behind a page: the plan's own, and those of `memory` and of the weights, counted anew."""

    def __init__(self, fields: dict[str, Any], made: Plan, head: bool) -> None:
        self.fields, self.made, self.head = fields, made, head
        self.best = made.option
        self.weighed: dict[Option, Weighed] = {one.option: one for one in made.weighed}
        self.device: Device = made.device
        self.budget = int(self.device.memory_bytes * 0.9)
        self.said = {choice.topic: choice for choice in made.choices}
        self.work = WORKLOADS[made.workload]

    @cached_property
    def weights(self) -> Weights:
        counted = count_weights(load_config(copy.deepcopy(self.fields)), torch.bfloat16, self.device)
        assert counted is not None
        return counted

    @property
    def is_divided(self) -> bool:
        return self.said["parallelism"].choice.startswith("tensor parallel")

    @property
    def kv_parts(self) -> int:
        keeps_all = "each device keeps all keys and values" in self.said["parallelism"].gain
        return self.made.num_devices if self.is_divided and not keeps_all else 1

    def kv(self, format: str, is_compiled: bool) -> int:
        """Return the bytes of one batch in a growing cache, or in one of fixed addresses, as counted by `memory`."""
        return self._memory(format, is_compiled).used_bytes

    def reserved(self, format: str, is_compiled: bool) -> int:
        """Return the bytes of `kv` with blocks that are reserved ahead."""
        return self._memory(format, is_compiled).reserved_bytes

    def _memory(self, format: str, is_compiled: bool) -> MemoryReport:
        made = self.made
        size = 16 if made.context < 16384 and not is_sealed(format) else 64
        return memory(
            copy.deepcopy(self.fields),
            context=made.context,
            batch=made.batch,
            format=format,
            block_size=size,
            max_tokens=-(-made.context // size) * size * made.batch,
            compileable=is_compiled,
            weights=False,
        )

    def is_best(self, change: Option) -> bool:
        """Return whether the choice is as fast as another option, up to the saving that a lossy format must reach."""
        return self.weighed[self.best].request_s <= self.weighed[change].request_s / (1 - LOSS) * 1.0001

    def request(self, option: Option) -> float:
        return self.weighed[option].request_s

    def fits(self, size: float) -> bool:
        """Return whether weights and `size` bytes fit, judged by sums over all devices."""
        return self.weights.num_bytes + size <= self.made.num_devices * self.budget

    @property
    def kv_share(self) -> float:
        kv = self.kv("native", self.best.is_compiled) / self.kv_parts
        return kv / (kv + self.weights.bytes_read(self.made.batch, self.made.num_devices if self.is_divided else 1))

    def formats(self) -> list[Option]:
        return [one for one in self.weighed if one._replace(format=self.best.format) == self.best and one != self.best]


def rules(f: Facts) -> dict[str, list[Rule]]:
    """Return the rules for the sentences of each topic."""
    return {
        "attention": attention_rules(f),
        "cache": cache_rules(f),
        "format": format_rules(f),
        "block size": block_rules(f),
        "prefix sharing": prefix_rules(f),
        "speculation": draft_rules(f),
        "compile": compile_rules(f),
        "parallelism": device_rules(f),
    }


def attention_rules(f: Facts) -> list[Rule]:
    kind = f.best._replace(format="native", shares_prefix=False, draft="none")
    latent = f.fields["model_type"] == "deepseek_v3"

    def gain(versus: str, why: str) -> None:
        before, after = versus.split(" (")[0].replace(" ms", "").replace(" s", "").split(" -> ")
        assert number(before) >= number(after)
        if kind in f.weighed:
            unit = " ms" if " ms " in versus else " s"
            assert same_seconds(after + unit, f.weighed[kind].step_ms / 1e3)
        assert (before == after) == bool(why) or number(before) / number(after) < 1.01

    return [
        Rule("attention: hf_kvopt", lambda: "attention=False" not in "\n".join(f.made.code)),
        Rule("because reads blocks in place and builds no [q, kv] mask", lambda: not latent),
        Rule(
            "because builds no [q, kv] mask; latents are expanded at each step: the projection to absorb is quantized",
            lambda: latent and "quantization_config" in f.fields and f.weights.packs_latents,
        ),
        Rule(
            "because builds no [q, kv] mask, and reads latents as they lie instead of expanding them",
            lambda: latent and not f.weights.packs_latents,
        ),
        Rule("gain: step {versus} against gathering{any}", gain),
        Rule(
            "not sdpa over a paged cache: gathers {gib} of keys and values at each step",
            lambda size: same_bytes(size, f.kv("native", f.best.is_compiled)),
        ),
    ]


def cache_rules(f: Facts) -> list[Rule]:
    p, plain = f.made.predicted, Option("native", False, False, "none")
    bandwidth = f.device.bandwidth * (MEMORY_SHARE if f.device.is_gpu else 1)
    cat = 2 * p.default_kv_bytes / f.kv_parts / bandwidth

    def capped(tokens: str) -> bool:
        code = "\n".join(f.made.code)
        return number(tokens) == p.max_tokens and f"max_tokens={p.max_tokens}" in code and f.fits(p.most_kv_bytes)

    def moved(size: str) -> bool:
        return same_bytes(size, 2 * p.default_kv_bytes)

    def hidden(size: str, taken: str, step: str, limit: str) -> bool:
        assert (limit == "the host") == (f.device.is_gpu and seconds(taken) < seconds(step)) or limit == "arithmetic"
        return moved(size) and same_seconds(taken, cat) and same_seconds(step, p.default_step_ms / 1e3)

    def part(size: str, taken: str, added: str) -> bool:
        return moved(size) and same_seconds(taken, cat) and 0 < seconds(added) < seconds(taken)

    def whole(size: str, taken: str, step: str) -> bool:
        figures = same_seconds(taken, cat) and same_seconds(step, p.default_step_ms / 1e3)
        return moved(size) and figures and seconds(taken) < seconds(step)

    def store(count: str, size: str) -> bool:
        batches = {"one batch": 1}.get(count) or int(count.split()[0])
        size_of_block = f.made.block_size
        row = -(-f.made.context // size_of_block) * size_of_block + size_of_block
        return p.max_tokens == batches * f.made.batch * row and same_bytes(size, p.most_kv_bytes)

    def alone(versus: str, why: str) -> bool:
        step = f.weighed[plain].step_ms
        assert bool(why) == (abs(p.default_step_ms - step) < 0.005 * p.default_step_ms)
        return same_versus(versus, p.default_step_ms / 1e3, step / 1e3)

    is_grown = not f.best.is_compiled and not f.best.shares_prefix
    cat_rule = "not DynamicCache: torch.cat moves {gib} more at each step: "
    peak = "; and it doubles a layer's peak"
    return [
        Rule("cache: paged, fixed at {num} tokens", lambda n: capped(n) and f.best.is_compiled),
        Rule("cache: paged, a store capped at {num} tokens", lambda n: capped(n) and f.best.shares_prefix),
        Rule("cache: paged, capped at {num} tokens", lambda n: capped(n) and is_grown),
        Rule(
            "because a graph needs fixed addresses: {gib} from the start",
            # Sealed blocks have exact places beside them, of which a batch uses a part.
            lambda size: (
                same_bytes(size, p.most_kv_bytes) and (is_sealed(f.best.format) or same_bytes(size, p.kv_bytes))
            ),
        ),
        Rule("because a store for {any} of this size, {gib} at most", store),
        Rule(
            "because one batch of this size, {gib} at most: nothing is reserved beyond it",
            lambda size: same_bytes(size, p.most_kv_bytes) and p.kv_bytes <= p.most_kv_bytes,
        ),
        Rule("gain: native blocks and attention alone: step {versus}{any}", alone),
        Rule(
            "gain: native blocks, {gib}, do not fit",
            lambda size: same_bytes(size, f.reserved("native", False)) and plain not in f.weighed,
        ),
        Rule(cat_rule + "{time} that pass while the step waits {time} for {any}" + peak, hidden),
        Rule(cat_rule + "{time}, which make the step {time} longer" + peak, part),
        Rule(cat_rule + "{time} of the step's {time}" + peak, whole),
        Rule("not StaticCache: no sharing, no formats, no crop by rows", lambda: not f.best.is_compiled),
    ]


def format_rules(f: Facts) -> list[Rule]:
    p, best, native = f.made.predicted, f.best, f.best._replace(format="native")
    savings = {one.format: 1 - f.request(one) / f.request(best) for one in f.formats()}

    def is_size(name: str, size: str) -> bool:
        return same_bytes(size, f.weighed[best._replace(format=name)].kv_bytes)

    def misfit(name: str, size: str) -> bool:
        return best._replace(format=name) not in f.weighed and (
            f.kv_parts < f.made.num_devices or not f.fits(size_of(size))
        )

    def native_saves_nothing(share: str, step: str, limit: str) -> bool:
        assert max(map(abs, savings.values())) < 0.0005
        assert limit in ("the host", "arithmetic")
        return near(share, 100 * f.kv_share) and same_seconds(step, p.step_ms / 1e3)

    def native_saves_little(share: str, most: str, least: str) -> bool:
        assert near(most, 100 * max(savings.values()))
        return near(share, 100 * f.kv_share) and number(most) < number(least) == 100 * LOSS

    def worth(share: str, name: str, saved: str, least: str) -> bool:
        assert near(share, 100 * f.kv_share)
        assert near(saved, 100 * (1 - f.request(best) / f.request(native)))
        return name == best.format and number(saved) >= number(least) == 100 * LOSS

    def instead(kept: str, size: str) -> bool:
        assert same_bytes(kept, p.kv_bytes)
        return size_of(kept) < size_of(size)

    def faster(kept: str, size: str, versus: str, most: str, *_: str) -> bool:
        assert same_versus(versus, f.weighed[native].step_ms / 1e3, p.step_ms / 1e3)
        return instead(kept, size) and is_size("native", size) and float(most) == MOST_SPEEDUP[best.format]

    def small_saving(name: str, size: str, saved: str, least: str) -> bool:
        assert near(saved, 100 * savings[name])
        return is_size(name, size) and 0 < savings[name] < LOSS and number(least) == 100 * LOSS

    def longer(name: str, size: str, more: str) -> bool:
        return is_size(name, size) and near(more, -100 * savings[name]) and savings[name] < 0

    share = "because KV is {percent} of the KV and weights that a step reads"
    kinds = ("", " at fixed addresses", " in a store")
    return [
        Rule("format: {word}", lambda name: name == best.format and _named(f.made.code, name)),
        Rule(share + ", but the step waits {time} for {any}: fewer bytes save nothing", native_saves_nothing),
        Rule(
            share + ": a format saves at most {percent} of a request, and {percent} make up for a loss",
            native_saves_little,
        ),
        Rule(
            share + "; on a CPU formats are timed like native, so they give memory alone",
            lambda part: near(part, 100 * f.kv_share) and max(map(abs, savings.values())) == 0,
        ),
        Rule(
            "because KV is {percent} of the KV and weights that a native step reads: {word} saves {percent} of a "
            "request, and {percent} make up for a loss",
            worth,
        ),
        *(
            Rule(
                f"because {{gib}} of native KV{kind} do not fit beside {{gib}} of weights{{any}}",
                lambda size, weights, _: misfit("native", size) and same_bytes(weights, p.weight_bytes),
            )
            for kind in kinds
        ),
        Rule("gain: no loss; {gib} of KV", lambda size: same_bytes(size, p.kv_bytes) and best.format == "native"),
        Rule("gain: {gib} of KV instead of {gib}", instead),
        Rule(
            "gain: {gib} of KV instead of {gib}; step {versus}; keys and values are read at most {num}x faster, by "
            "instruction counts",
            faster,
        ),
        Rule(
            "not {word}: {gib} of KV, no faster", lambda name, size: is_size(name, size) and abs(savings[name]) < 0.0005
        ),
        Rule("not {word}: {gib} of KV, takes {percent} longer", longer),
        Rule(
            "not {word}: {gib} of KV, saves {percent} of a request, where {percent} would make up for a loss",
            small_saving,
        ),
        *(Rule(f"not {{word}}: {{gib}} of KV{kind} do not fit beside the weights", misfit) for kind in kinds),
        Rule("not fp8_e4m3: the bytes of int8, with more loss", lambda: is_fast8(f.device)),
        Rule(
            "not fp8_e4m3: needs compute capability {num}, {any} has {num}",
            lambda needs, name, has: name == f.device.name and number(has) < number(needs) and not is_fast8(f.device),
        ),
    ]


def is_fast8(device: Device) -> bool:
    return (device.capability or (9, 0)) >= (8, 9)


def _named(code: tuple[str, ...], format: str) -> bool:
    return f'cache="{"paged" if format == "native" else format}"' in "\n".join(code)


def block_rules(f: Facts) -> list[Rule]:
    made = f.made

    def rows(tokens: str, blocks: str, size: str) -> bool:
        return number(tokens) == made.context and number(blocks) == -(-made.context // int(size))

    return [
        Rule("block size: {num}", lambda n: int(n) == made.block_size and f"block_size={n}" in "\n".join(made.code)),
        Rule(
            "because {word} seals whole blocks of {num}",
            lambda name, n: name == f.best.format and is_sealed(name) and int(n) == made.block_size == 64,
        ),
        Rule("because prefixes are shared in steps of a block", lambda: f.best.shares_prefix and made.block_size == 16),
        Rule("because rows of {num} tokens have {num} blocks of {num}: a short table", rows),
        Rule(
            "because rows of {num} tokens have {num} blocks of {num}, and nothing is shared by blocks",
            lambda *found: rows(*found) and not f.best.shares_prefix,
        ),
        Rule(
            "gain: half a block unused a row in the mean, {percent} of it",
            lambda part: near(part, 100 * (made.block_size - 1) / 2 / made.context),
        ),
        Rule("not 64: coarser steps", lambda: made.block_size == 16),
        Rule("not 64: {percent} of a row unused in the mean", lambda part: near(part, 100 * 63 / 2 / made.context)),
        Rule(
            "not {num}: {num} blocks of {num}, a longer table",
            lambda n, blocks, size: n == size == "16" and number(blocks) > made.context / made.block_size,
        ),
    ]


def prefix_rules(f: Facts) -> list[Rule]:
    p, best = f.made.predicted, f.best
    peer = best._replace(shares_prefix=not best.shares_prefix)
    sharing = [one for one in f.weighed if one.shares_prefix]
    against = "{num} s a request against {num} s"

    def other(theirs: str, ours: str) -> bool:
        fastest = min(f.request(one) for one in sharing) if not best.shares_prefix else f.request(peer)
        return near(theirs, fastest) and near(ours, p.request_s) and number(theirs) >= number(ours)

    def seen(part: str, workload: str) -> bool:
        return near(part, 100 * f.work.seen_share) and workload == f.made.workload

    return [
        Rule("prefix sharing: on", lambda: best.shares_prefix and "prefix_sharing=True" in "\n".join(f.made.code)),
        Rule("prefix sharing: off", lambda: not best.shares_prefix and "prefix_sharing" not in "\n".join(f.made.code)),
        Rule("because {percent} of the prompt is taken as seen before ({word})", seen),
        Rule("because unrelated prompts have no beginning in common", lambda: f.work.seen_share == 0),
        Rule("because a cache of fixed addresses shares nothing", lambda: best.is_compiled and sharing),
        *(
            Rule(
                f"because a store{kept} takes {{gib}}, which does not fit",
                lambda size: not sharing and not f.fits(size_of(size)),
            )
            for kept in ("", " that keeps all tokens of sliding layers too")
        ),
        Rule(
            "because the first token waits {time} for the host either way",
            lambda time: (
                same_seconds(time, f.weighed[peer].first_token_ms / 1e3)
                and f.weighed[peer].first_token_ms == p.first_token_ms
            ),
        ),
        Rule(
            "gain: first token {versus}",
            lambda versus: same_versus(versus, f.weighed[peer].first_token_ms / 1e3, p.first_token_ms / 1e3),
        ),
        Rule("gain: none", lambda: not best.shares_prefix),
        Rule("not off: computes the same beginnings again, " + against, other),
        Rule("not on: " + against, other),
    ]


def draft_rules(f: Facts) -> list[Rule]:
    p, best = f.made.predicted, f.best
    undrafted = best._replace(draft="none")
    drafted = [one for one in f.weighed if one.draft != "none"]

    def verifies(nodes: str, ours: str, other: str) -> bool:
        assert int(nodes) > 1
        return same_seconds(ours, p.step_ms / 1e3) and same_seconds(other, f.weighed[undrafted].step_ms / 1e3)

    def per_token(versus: str, accepted: str, _: str) -> bool:
        assert near(accepted, p.accepted)
        return same_versus(versus, f.weighed[undrafted].step_ms / 1e3, p.step_ms / 1e3 / p.accepted)

    def more_rows(rows: str) -> bool:
        return f.made.goal == "throughput" and number(rows) == p.largest_batch > f.made.batch

    def tried(draft: str, theirs: str, ours: str) -> bool:
        fastest = min(f.request(one) for one in drafted if one.draft == draft and one.format == best.format)
        return near(theirs, fastest) and near(ours, p.request_s) and number(theirs) >= number(ours)

    return [
        Rule("speculation: off", lambda: best.draft == "none" and "speculative" not in "\n".join(f.made.code)),
        Rule("speculation: {word}", lambda name: name == best.draft and "custom_generate=draft" in f.made.code[-1]),
        Rule("because a step that verifies {num} tokens a row takes {time}, one without drafts {time}", verifies),
        Rule("because drafts are for latency, and throughput comes from more rows: up to {num} fit", more_rows),
        Rule("because drafts are for latency", lambda: f.made.goal == "throughput" and p.largest_batch == f.made.batch),
        Rule(
            "because planned for {num} rows at most: {num} share each reading of the weights already",
            lambda most, rows: int(rows) == f.made.batch > int(most) == 8,
        ),
        Rule(
            "because the processes of a divided model would each time their drafts for themselves", lambda: f.is_divided
        ),
        Rule(
            "because no head at hand, and the output does not copy from its prompt",
            lambda: not f.head and not f.work.copies and not drafted,
        ),
        Rule("because a compiled step takes no drafts", lambda: best.is_compiled and drafted),
        Rule("because drafts take longer to verify than they save", lambda: not best.is_compiled and drafted),
        Rule("gain: none", lambda: best.draft == "none" and p.accepted == 1),
        Rule("gain: {versus} a token, by {num} tokens a step ({any})", per_token),
        Rule("not {word}: {num} s a request against {num} s", tried),
        Rule(
            "not a trained head (EAGLE-3: {num}x at batch {num}, published): none given; pass --head if there is one",
            lambda *_: not f.head and f.made.goal == "latency" and f.made.batch <= 8 and not f.is_divided,
        ),
    ]


def compile_rules(f: Facts) -> list[Rule]:
    best, p = f.best, f.made.predicted
    graph = Option(best.format, True, False, "none")
    eager = Option(best.format, False, False, "none")

    def saved(versus: str) -> bool:
        return same_versus(versus, f.weighed[eager].step_ms / 1e3, f.weighed[graph].step_ms / 1e3)

    def but(versus: str, theirs: str, ours: str) -> bool:
        figures = near(theirs, f.request(graph)) and near(ours, p.request_s)
        return saved(versus) and figures and number(theirs) >= number(ours)

    def works(device: str, step: str) -> bool:
        return same_seconds(step, f.weighed[eager].step_ms / 1e3) and seconds(device) <= seconds(step)

    return [
        Rule("compile: on", lambda: best.is_compiled and "compileable=True" in "\n".join(f.made.code)),
        Rule("compile: off", lambda: not best.is_compiled and "compileable" not in "\n".join(f.made.code)),
        Rule(
            "because the device works {time} of the eager step's {time} and waits for the host else",
            lambda *t: works(*t) and seconds(t[0]) < seconds(t[1]),
        ),
        Rule("because the device works {time} of the eager step's {time}", works),
        Rule("because generate() compiles on GPUs alone", lambda: not f.device.is_gpu),
        Rule("because a cache of fixed addresses was ruled out", lambda: not any(o.is_compiled for o in f.weighed)),
        Rule(
            "because generate() does not compile weights of this quantization",
            lambda: "quantization_config" in f.fields,
        ),
        Rule("because a graph over several devices was never tried", lambda: f.made.num_devices > 1),
        *(
            Rule(
                f"because a fixed cache{kept} takes {{gib}}, which does not fit",
                lambda size: (
                    graph not in f.weighed
                    and not f.fits(size_of(size))
                    and same_bytes(size, f.reserved(best.format, True)),
                ),
            )
            for kept in ("", " that keeps all tokens of sliding layers too")
        ),
        *(
            Rule(
                f"because it cannot be had with {others}, by which a request takes less",
                lambda others=others: (
                    (best.shares_prefix == ("sharing" in others))
                    and ((best.draft != "none") == ("drafting" in others))
                    and f.request(best) < f.request(graph)
                ),
            )
            for others in ("prefix sharing", "drafting", "prefix sharing or drafting")
        ),
        Rule("gain: step {versus}, by published host times", saved),
        Rule("gain: none", lambda: not best.is_compiled),
        Rule("not eager: the device idles", lambda: f.weighed[graph].step_ms < f.weighed[eager].step_ms),
        Rule("not on: step {versus}, but {num} s a request against {num} s", but),
    ]


def device_rules(f: Facts) -> list[Rule]:
    made, p = f.made, f.made.predicted
    code = "\n".join(made.code)

    def needs(size: str, budget: str) -> bool:
        assert same_bytes(size, p.weight_bytes + p.most_kv_bytes)
        return same_bytes(budget, f.budget) and (p.weight_bytes + p.most_kv_bytes <= f.budget) == (
            made.num_devices == 1
        )

    def room(rows: str, tokens: str, *_: str) -> bool:
        return number(rows) == p.largest_batch >= made.batch and number(tokens) == made.context

    return [
        Rule("parallelism: none", lambda: made.num_devices == 1 and "tp_size" not in code),
        Rule(
            "parallelism: tensor parallel over {num}", lambda n: int(n) == made.num_devices and f"(tp_size={n})" in code
        ),
        Rule(
            "parallelism: layers spread over {num}",
            lambda n: int(n) == made.num_devices and 'device_map="auto"' in code,
        ),
        Rule("because weights and KV need {gib}, the device holds {gib}", needs),
        Rule("because weights and KV need {gib}, one device holds {gib}", needs),
        Rule("gain: up to {num} rows of {num} tokens fit", room),
        Rule("gain: up to {num} rows of {num} tokens fit; traffic between devices is not counted", room),
        Rule(
            "gain: up to {num} rows of {num} tokens fit; each device keeps all keys and values; traffic between "
            "devices is not counted",
            room,
        ),
        Rule("gain: up to {num} rows of {num} tokens fit; no time: one device works at a time", room),
        Rule("not layers spread by device_map='auto': one device works at a time", lambda: f.is_divided),
        Rule("not tensor parallelism: {any}", lambda why: not f.is_divided),
    ]
