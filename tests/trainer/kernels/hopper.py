"""Compile the kernels of modules for an H100 or H200, on a machine without one.

Triton's interpreter takes code that its compiler does not. Run as a module, without
`TRITON_INTERPRET`: calls the small cases of the modules that are named, with launches
replaced by compilations, and prints how many different ones there were.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compiled
from triton.runtime.jit import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.bool: "*i1",
}


def main(modules: list[str]) -> None:
    """Compile what the cases of some modules launch, forward and backward."""
    done: set[str] = set()

    def compile_only(
        self: Any, *words: Any, grid: Any, warmup: Any, **named: Any
    ) -> None:
        of = {
            **dict(zip((each.name for each in self.params), words, strict=False)),
            **named,
        }
        constants = {
            each.name: of[each.name] for each in self.params if each.is_constexpr
        }
        signature = {
            each.name: "constexpr"
            if each.is_constexpr
            else each.annotation_type or _type_of(of[each.name])
            for each in self.params
        }
        options = {key: value for key, value in named.items() if key not in signature}
        key = f"{self.__name__} {signature} {constants} {options}"
        if key not in done:
            source = ASTSource(self, signature=signature, constexprs=constants)
            compiled(source, target=HOPPER, options=options or None)
            done.add(key)

    JITFunction.run = compile_only
    for name in modules:
        for case in importlib.import_module(name).CASES:
            for dtype in (torch.float32, torch.bfloat16) if case.small else ():
                _call(case, dtype)
    print(len(done))


def _call(case: Any, dtype: torch.dtype) -> None:
    output = case.fused(*case.inputs(torch.device("cpu"), dtype, 0))
    outputs = (output,) if isinstance(output, Tensor) else output
    for each in outputs:
        if each.requires_grad:
            each.sum().backward(retain_graph=True)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return "fp32"


if __name__ == "__main__":
    main(sys.argv[1:])
