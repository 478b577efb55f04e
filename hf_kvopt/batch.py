"""`torchrun -m hf_kvopt.batch ...` and `python -m hf_kvopt.batch ...`: the command `python -m hf_kvopt batch`."""

import sys

from hf_kvopt.cli.batch import main

if __name__ == "__main__":
    sys.exit(main())
