"""The memory that can be reached from an object: tensors, arrays and long texts, each storage for whoever came first.

Objects are asked for what they refer to as the garbage collector does it, so lists, modules, closures, generators and
errors with their frames are all looked into, and no code of the user's runs. What leads to everything is not entered:
modules, classes, the globals of functions and frames, and the notebook's own machinery. What autograd keeps for a
backward is not visible to Python; a tensor that holds on to some is told.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import BuiltinFunctionType, FrameType, FunctionType, ModuleType, TracebackType
from typing import Any

from nbqlora.core.units import MIB

# Objects looked at for all holders together: 0.3 s. Beyond them the answer says that it is not whole.
MOST_OBJECTS = 400_000
_MACHINERY = ("IPython", "ipykernel", "traitlets", "zmq", "tornado", "asyncio", "jupyter_client", "comm", "logging")


@dataclass
class Reached:
    """What one object keeps: bytes by place, and whether a tensor among it keeps an autograd graph."""

    card_bytes: int = 0
    ram_bytes: int = 0
    graph: bool = False


class Walk:
    """Counts for one holder after another.

    Args:
        never: objects that are not entered: namespaces of the notebook, and what is counted by itself.
    """

    def __init__(self, never: Iterable[Any]) -> None:
        self._keep = list(never)
        self._seen = {id(x) for x in self._keep}
        self._storages: set[int] = set()
        self._torch: Any = sys.modules.get("torch")
        self._numpy: Any = sys.modules.get("numpy")
        self.whole = True

    def enter(self, root: Any, *, again: bool = False) -> Reached:
        """What ``root`` keeps that no holder before it did.

        Args:
            again: look into it although it is one of those that are never entered.
        """
        if again:
            self._seen.discard(id(root))
        found, stack = Reached(), [root]
        while stack:
            thing = stack.pop()
            if id(thing) in self._seen:
                continue
            if len(self._seen) >= MOST_OBJECTS:
                self.whole = False
                break
            self._seen.add(id(thing))
            self._keep.append(thing)  # an id may not be given to another object meanwhile
            if not self._count(thing, found, stack):
                stack += [x for x in _referents(thing) if _leads_on(x)]
        return found

    def _count(self, thing: Any, found: Reached, stack: list[Any]) -> bool:
        """Account for memory itself; True when nothing behind it has to be looked at."""
        kind = type(thing)
        if self._torch is not None and issubclass(kind, self._torch.Tensor):
            self._count_tensor(thing, found, stack)
            return False
        if self._numpy is not None and issubclass(kind, self._numpy.ndarray):
            if thing.base is not None:
                stack.append(thing.base)
            elif thing.flags.owndata:
                self._add(thing.__array_interface__["data"][0], thing.nbytes, "cpu", found)
            return not thing.dtype.hasobject
        if kind in (bytes, bytearray, str):
            found.ram_bytes += sys.getsizeof(thing)
            return True
        return False

    def _count_tensor(self, tensor: Any, found: Reached, stack: list[Any]) -> None:
        try:
            storage = tensor.untyped_storage()
            self._add(storage.data_ptr(), storage.nbytes(), tensor.device.type, found)
        except (NotImplementedError, RuntimeError):  # a sparse or fake tensor has no storage of its own
            return
        if tensor.grad_fn is not None:
            found.graph = True
        elif tensor.grad is not None:
            stack.append(tensor.grad)

    def _add(self, address: int, n_bytes: int, device_type: str, found: Reached) -> None:
        if not address or address in self._storages:
            return
        self._storages.add(address)
        if device_type == "cuda":
            found.card_bytes += n_bytes
        elif device_type == "cpu":
            found.ram_bytes += n_bytes


def _leads_on(thing: Any) -> bool:
    """Whether memory may stand behind it."""
    kind = type(thing)
    if issubclass(kind, (type, ModuleType, FrameType, BuiltinFunctionType)):
        return False
    if kind in (bytes, bytearray, str):
        return sys.getsizeof(thing) >= MIB
    if not gc.is_tracked(thing) and not hasattr(kind, "nbytes"):
        return False
    return kind.__module__.partition(".")[0] not in _MACHINERY


def _referents(thing: Any) -> list[Any]:
    if isinstance(thing, FunctionType):  # its globals are the notebook
        own = [thing.__defaults__, thing.__kwdefaults__, thing.__closure__, vars(thing)]
        return [x for x in own if x is not None]
    if isinstance(thing, TracebackType):
        rest = [] if thing.tb_next is None else [thing.tb_next]
        return [*rest, *_locals(thing.tb_frame)]
    if isinstance(thing, FrameType):
        return _locals(thing)
    return gc.get_referents(thing)


def _locals(frame: FrameType) -> list[Any]:
    """A frame's own values; its globals belong to a module."""
    outside = {id(frame.f_globals), id(frame.f_builtins)}
    return [x for x in gc.get_referents(frame) if id(x) not in outside]
