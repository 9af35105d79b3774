"""Compiles every case of ``cases_*.py`` for one capability, without a card; a JSON line a case.

    python -m tests.kernels.compile_all 75

Not under TRITON_INTERPRET: it is read when a kernel is decorated. The last line names all kernels of nbqlora.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import nbqlora.kernels


def cases() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """All cases of all modules beside this one."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
    return [case for module in modules for case in importlib.import_module(f"tests.kernels.{module}").CASES]


def kernels() -> list[str]:
    """Every kernel that is written in nbqlora.kernels; what they call has other names."""
    modules = [
        importlib.import_module(f"nbqlora.kernels.{m.name}") for m in pkgutil.iter_modules(nbqlora.kernels.__path__)
    ]
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, triton.runtime.JITFunction)]
    return sorted({f.__name__ for f in functions if f.__name__.endswith("_kernel")})


def compiled(
    capability: int, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """What is to be known of the result. Pointers and integers divide by 16, as in a launch of a usual model."""
    kinds = [(i, k) for i, (n, k) in enumerate(signature.items()) if n not in kernel.do_not_specialize]
    attrs = {(i,): [["tt.divisibility", 16]] for i, kind in kinds if kind.startswith("*") or kind in ("i32", "i64")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": kernel.__name__,
        "any_value": list(kernel.do_not_specialize),
        "shared": result.metadata.shared,
        "mma": "mma" in result.asm["ptx"],
        "cubin_bytes": len(result.asm["cubin"]),
    }


def main(capability: int) -> None:
    """One line a case; bf16 only from 8.0, before which nothing here uses it."""
    for name, *what in cases():
        if capability >= 80 or not name.endswith("bf16"):
            print(json.dumps({"case": name, **compiled(capability, *what)}), flush=True)
    print(json.dumps({"kernels": kernels()}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
