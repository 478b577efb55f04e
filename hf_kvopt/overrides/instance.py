"""Override of a method on one module that survives copying and pickling the module and does not keep it alive."""

import weakref
from typing import Any, Self

from torch import nn

from hf_kvopt.errors import KVOptError


class InstanceOverride:
    """A callable for `module.__dict__[name]`, in place of the method `name` of the module's class.

    A closure over the module would make a reference cycle, and a deep copy of the module would still call the original.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> Any:
        """Module that this override belongs to."""
        module = self._module()
        if module is None:
            raise KVOptError(
                "the model was dropped before its method ran: got a call on enable(...) whose result nothing holds; "
                "keep it, model = hf_kvopt.enable(...), and call model.generate(...)"
            )
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        # When a module is copied, it is in the memo before its dict is copied.
        twin._module = weakref.ref(memo.get(id(self.module), self.module))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": self.module}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._module = weakref.ref(state["_module"])
