"""The interpreter's tests live in `triton/` and run in processes of their own.

Triton decides when it is imported whether kernels are interpreted, and our dispatch follows it, so that
TRITON_INTERPRET=1 in this process would send every other test's CPU tensors through the interpreter. An
ordinary run therefore does not collect `triton/`; `test_interpreter_rung.py` runs each of its files in
a subprocess. To work on one: `TRITON_INTERPRET=1 python -m pytest tests/kernels/triton`.
"""

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["triton"]
