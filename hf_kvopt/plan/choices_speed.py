"""Explanation of the choices that save computation or launches: prefix sharing, speculation, compilation."""

from hf_kvopt.plan.inputs import show_bytes
from hf_kvopt.plan.options import Option, accepted_of
from hf_kvopt.plan.weighing import MOST_ROWS_TO_DRAFT, Choice, Weighing, ms, plain, versus

_NO_HEAD = "a trained head (EAGLE-3: 3.0x at batch 1, published): none given; pass --head if there is one"


def prefix(w: Weighing) -> Choice:
    """Explain whether prompts share their common prefixes."""
    setup, peer = w.setup, w.best._replace(shares_prefix=not w.best.shares_prefix)
    if w.best.shares_prefix:
        # A device that holds a store also holds one batch: the peer fits.
        first = versus(w.timed[peer].first_token.seconds, w.timed[w.best].first_token.seconds)
        reason = f"{setup.work.seen_share:.0%} of the prompt is taken as seen before ({setup.workload})"
        rejected = (f"off: computes the same beginnings again, {w.request_of(peer)}",)
        return Choice("prefix sharing", "on", reason, f"first token {first}", rejected)
    reason, others = _why_not_shared(w, peer)
    return Choice("prefix sharing", "off", reason, "none", others)


def _why_not_shared(w: Weighing, peer: Option) -> tuple[str, tuple[str, ...]]:
    """Return the reason against sharing, and the rejected alternatives."""
    setup, sharing = w.setup, [option for option in w.timed if option.shares_prefix]
    if setup.work.seen_share == 0:
        return "unrelated prompts have no beginning in common", ()
    if setup.why_not_shared is not None:
        return f"refused for this model: {setup.why_not_shared}", ()
    if not sharing:
        size = min(w.misfit(option) for option in w.misfits if option.shares_prefix)
        kept = " that keeps all tokens of sliding layers too" * setup.slides
        return f"a store{kept} takes {show_bytes(size)}, which does not fit", ()
    rejected = (f"on: {w.request_of(min(sharing, key=lambda option: w.timed[option].request_s))}",)
    if w.best.is_compiled:
        return "a cache of fixed addresses shares nothing", rejected
    if peer not in w.timed:
        return f"a store of {w.best.format} KV takes {show_bytes(w.misfit(peer))}, which does not fit", rejected
    return f"the first token waits {ms(w.timed[peer].first_token.seconds)} for the host either way", rejected


def speculation(w: Weighing) -> Choice:
    """Explain whether tokens are drafted, and by which drafter."""
    setup, best = w.setup, w.best
    if best.draft == "none":
        return Choice("speculation", "off", _why_not_drafted(w), "none", _other_drafts(w))
    ours, other = w.timed[best], w.timed[best._replace(draft="none")]
    accepted = accepted_of(setup, best.draft)
    reason = (
        f"a step that verifies {accepted.nodes} tokens a row takes {ms(ours.step.seconds)}, one without drafts "
        f"{ms(other.step.seconds)}"
    )
    per_token = versus(other.step.seconds, ours.step.seconds / ours.accepted)
    gain = f"{per_token} a token, by {ours.accepted:g} tokens a step ({accepted.source})"
    return Choice("speculation", best.draft, reason, gain, () if w.head else (_NO_HEAD,))


def _why_not_drafted(w: Weighing) -> str:
    setup = w.setup
    if setup.has_states:
        return "recurrent states cannot be cut back to what was accepted"
    if setup.config.is_encoder_decoder:
        return "encoder-decoders do not speculate"
    if setup.goal == "throughput":
        most = w.largest_batch if w.largest_batch is not None else setup.batch + 1
        rows = f", and throughput comes from more rows: up to {most:,} fit" if most > setup.batch else ""
        return f"drafts are for latency{rows}"
    if setup.batch > MOST_ROWS_TO_DRAFT:
        return f"planned for {MOST_ROWS_TO_DRAFT} rows at most: {setup.batch} share each reading of the weights already"
    if w.layout.is_divided:
        return "the processes of a divided model would each time their drafts for themselves"
    if not any(option.draft != "none" for option in w.timed):
        return "no head at hand, and the output does not copy from its prompt"
    return "a compiled step takes no drafts" if w.best.is_compiled else "drafts take longer to verify than they save"


def _other_drafts(w: Weighing) -> tuple[str, ...]:
    """List the best time of each rejected drafter, and whether a head could have been considered."""
    tried: dict[str, Option] = {}
    for option in sorted(w.timed, key=lambda option: w.timed[option].request_s):
        if option.draft != "none" and option.format == w.best.format:
            tried.setdefault(option.draft, option)
    lines = [f"{draft}: {w.request_of(option)}" for draft, option in tried.items()]
    could_draft = w.setup.goal == "latency" and w.setup.batch <= MOST_ROWS_TO_DRAFT and not w.layout.is_divided
    if not w.head and could_draft and not w.setup.has_states and not w.setup.config.is_encoder_decoder:
        lines.append(_NO_HEAD)
    return tuple(lines)


def compile(w: Weighing) -> Choice:
    """Explain whether generate() compiles the decode step."""
    setup = w.setup
    graph, eager = Option(w.best.format, True, False, "none"), plain(w.best.format)
    reason = None
    if not setup.device.is_gpu:
        reason = "generate() compiles on GPUs alone"
    elif not setup.fixed:
        reason = "a cache of fixed addresses was ruled out"
    elif setup.has_states:
        reason = "recurrent states are not in fixed memory"
    elif not setup.weights.compiles:
        reason = "generate() does not compile weights of this quantization"
    elif w.layout.count > 1:
        reason = "a graph over several devices was never tried"
    elif graph not in w.timed:
        kept = " that keeps all tokens of sliding layers too" * setup.slides
        reason = f"a fixed cache{kept} takes {show_bytes(w.misfit(graph))}, which does not fit"
    if reason is not None:
        return Choice("compile", "off", reason, "none", ())
    step = w.timed[eager].step
    gain = f"step {versus(step.seconds, w.timed[graph].step.seconds)}"
    works = f"the device works {ms(step.device_s)} of the eager step's {ms(step.seconds)}"
    if w.best.is_compiled:
        waits = f"{works} and waits for the host else"
        return Choice("compile", "on", waits, f"{gain}, by published host times", ("eager: the device idles",))
    others = ["prefix sharing"] * w.best.shares_prefix + ["drafting"] * (w.best.draft != "none")
    else_less = f"it cannot be had with {' or '.join(others)}, by which a request takes less" if others else works
    return Choice("compile", "off", else_less, "none", (f"on: {gain}, but {w.request_of(graph)}",))
