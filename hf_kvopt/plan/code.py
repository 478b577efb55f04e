"""Python lines that carry out a plan."""

from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.options import Holding, Option
from hf_kvopt.plan.setup import Setup


def python_lines(setup: Setup, option: Option, layout: Layout, held: Holding) -> list[str]:
    """Return lines that load, enable and generate; the reader defines `name`, `inputs` and `head_path`."""
    dtype = str(setup.dtype)
    lines = ["import torch", "from transformers import AutoModelForCausalLM", "", "import hf_kvopt", ""]
    if layout.is_divided:
        lines[1:2] = ["from transformers import AutoModelForCausalLM, DistributedConfig"]
        lines += [
            f"# torchrun --nproc-per-node {layout.count} this_file.py",
            f"parallel = DistributedConfig(tp_size={layout.count})",
            f"model = AutoModelForCausalLM.from_pretrained(name, dtype={dtype}, distributed_config=parallel)",
        ]
    else:
        where = "auto" if layout.count > 1 else "cuda" if setup.device.is_gpu else "cpu"
        lines.append(f'model = AutoModelForCausalLM.from_pretrained(name, dtype={dtype}, device_map="{where}")')
    lines.append(_enable(setup, option, held))
    if option.draft == "head":
        lines.append("draft = hf_kvopt.speculative(hf_kvopt.DraftHead.from_pretrained(head_path))")
    elif option.draft != "none":
        lines.append(f'draft = hf_kvopt.speculative("{option.draft}")')
    extra = ", custom_generate=draft" if option.draft != "none" else ""
    lines.append(f"out = model.generate(**inputs, max_new_tokens={setup.new_tokens}{extra})")
    return lines


def _enable(setup: Setup, option: Option, held: Holding) -> str:
    cache = "paged" if option.format == "native" else option.format
    settings = [f'cache="{cache}"', f"block_size={held.block_size}", f"max_tokens={held.max_tokens}"]
    if not setup.takes_attention:
        settings.append("attention=False")
    if option.shares_prefix:
        settings.append("prefix_sharing=True")
    if option.is_compiled:
        settings.append("compileable=True")
    return f"hf_kvopt.enable(model, {', '.join(settings)})"
