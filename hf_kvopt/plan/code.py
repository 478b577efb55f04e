"""The Python lines that carry a plan out."""

from hf_kvopt.plan.options import Option
from hf_kvopt.plan.setup import Setup


def python_lines(setup: Setup, option: Option, num_devices: int, block_size: int) -> list[str]:
    """Return lines that load, enable and generate; `name`, `inputs` and `head_path` are the reader's."""
    where = f'"{"cuda" if setup.device.is_gpu else "cpu"}"'
    dtype = str(setup.dtype)
    lines = ["import torch", "from transformers import AutoModelForCausalLM", "", "import hf_kvopt", ""]
    if num_devices > 1:
        lines[1:2] = ["from transformers import AutoModelForCausalLM, DistributedConfig"]
        lines += [
            f"# torchrun --nproc-per-node {num_devices} this_file.py",
            f"parallel = DistributedConfig(tp_size={num_devices})",
            f"model = AutoModelForCausalLM.from_pretrained(name, dtype={dtype}, distributed_config=parallel)",
        ]
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained(name, dtype={dtype}, device_map={where})")
    lines.append(_enable(setup, option, num_devices, block_size))
    if option.draft == "head":
        lines.append("draft = hf_kvopt.speculative(hf_kvopt.DraftHead.from_pretrained(head_path))")
    elif option.draft != "none":
        lines.append(f'draft = hf_kvopt.speculative("{option.draft}")')
    extra = ", custom_generate=draft" if option.draft != "none" else ""
    lines.append(f"out = model.generate(**inputs, max_new_tokens={setup.work.new_tokens}{extra})")
    return lines


def _enable(setup: Setup, option: Option, num_devices: int, block_size: int) -> str:
    cache = "paged" if option.format == "native" else option.format
    settings = [f'cache="{cache}"', f"block_size={block_size}"]
    tokens = setup.batch * setup.context
    if option.shares_prefix:
        # A store outlives requests: a few batches of it, as far as the device holds them.
        tokens *= max(1, min(4, setup.largest_batch(option.format, num_devices) // setup.batch))
    settings.append(f"max_tokens={tokens}")
    if not setup.takes_attention:
        settings.append("attention=False")
    if option.shares_prefix:
        settings.append("prefix_sharing=True")
    if option.is_compiled:
        settings.append("compileable=True")
    return f"hf_kvopt.enable(model, {', '.join(settings)})"
