"""python -m hf_kvopt <command>: the tools that come with the library."""

import importlib
import sys

# Each module has `main(argv) -> int` and is imported only when it is asked for: some need optional packages.
COMMANDS = {
    "memory": ("hf_kvopt.cli.memory", "KV memory of a model from its config, and what fits on a card"),
    "plan": ("hf_kvopt.cli.plan", "what to choose for a deployment, and why"),
    "calibrate": ("hf_kvopt.cli.calibrate", "what each cache format loses on a model"),
    "doctor": ("hf_kvopt.cli.doctor", "versions, what is proven and what runs here, and one tiny generation"),
    "serve": ("hf_kvopt.cli.serve", "serve a model by an OpenAI-compatible API, with continuous batching"),
    "batch": ("hf_kvopt.cli.batch", "complete the prompts of a file, over any number of processes, resumable"),
    "eval": ("hf_kvopt.cli.evals", "an eval: speed, loss, equality, needle, acceptance, ..."),
    "train-draft": ("hf_kvopt.cli.train_draft", "train an EAGLE or Medusa head for a model"),
}


def main(argv: list[str] | None = None) -> int:
    """Hand the rest of the command line to a command; returns the exit status."""
    args = sys.argv[1:] if argv is None else argv
    name = args[0] if args else "--help"
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(args[1:])
    lines = [f"  {command:<12} {text}" for command, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: python -m hf_kvopt COMMAND ... (each takes --help)", "", *lines])
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(f"unknown command {name!r}: expected one of {', '.join(COMMANDS)}\n{usage}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
