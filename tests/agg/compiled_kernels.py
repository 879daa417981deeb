"""``python -m tests.agg.compiled_kernels``: what Triton makes of the kernels for an H100, on a machine without one.

Prints one JSON object: by kernel, its loads and stores of device memory and its bytes of spilled registers. Runs in a
process of its own, as Triton decides when it is imported whether it interprets or compiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from triton import compile as compile_kernel
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from agg import triton_kernels, triton_rows

H100 = GPUTarget("cuda", 90, 32)
SOFTMAX = {
    "logits": "*bf16",
    "target": "*i64",
    "here": "*i1",
    "told": "*fp32",
    "stride": "i32",
    "rows": "i32",
    "columns": "i32",
    "block": "constexpr",
    "rest": "constexpr",
}
GATE = {
    "p": "*bf16",
    "gate": "*fp32",
    "rare_count": "*i64",
    "begin": "i32",
    "size": "i32",
    "stride": "i32",
    "columns": "i32",
    "block": "constexpr",
    "rest": "constexpr",
}
SCALE = {
    "matrix": "*fp32",
    "factor": "*fp32",
    "rare_count": "*i64",
    "begin": "i32",
    "size": "i32",
    "rows": "i32",
    "columns": "i32",
    "programs": "i32",
    "block": "constexpr",
}
ENTRIES = {
    "matrix": "*fp32",
    "after": "*fp32",
    "hidden": "*bf16",
    "order": "*i64",
    "rows": "*i64",
    "here": "*i1",
    "coefficient": "*fp32",
    "row_stride": "i32",
    "column_stride": "constexpr",
    "count": "i32",
    "columns": "i32",
    "gated": "constexpr",
    "equal": "constexpr",
    "block": "constexpr",
}
HIDDEN = {
    "sums": "*fp32",
    "product": "*fp32",
    "scale": "*fp32",
    "weight": "*bf16",
    "order": "*i64",
    "rows": "*i64",
    "own": "*fp32",
    "weight_stride": "i32",
    "weight_column": "constexpr",
    "columns": "i32",
    "block": "constexpr",
}
ROUNDED = {
    "out": "*bf16",
    "sums": "*fp32",
    "of_rows": "*fp32",
    "scale": "*fp32",
    "columns": "i32",
    "has_rows": "constexpr",
    "has_scale": "constexpr",
    "block": "constexpr",
}
# Kernels that only have to compile: what they are given, integers and what is known then.
OTHERS = {
    "_keys_of_targets": ("keys:*i32 fits:*i1 target:*i64 rare_ids:*i1", {"gated": 1, "block": 256}),
    "_positions_of_keys": ("rows:*i64 here:*i1 valid:*i1 ends:*i64 keys:*i32", {"block": 256}),
    "_take_rows": ("out:*bf16 hidden:*bf16 order:*i64 valid:*i1", {"column_stride": 1, "block": 4096}),
    "_row_factors": ("between:*fp32 after:*fp32 g1:*fp32 g2:*fp32 least:fp32", {"block": 1024}),
    "_over_shards": (
        "terms:*fp32 of_ranks:*fp32 here:*i1 valid:*i1 scale:*fp32 alone:fp32 z_loss:fp32", {"block": 256}
    ),
}  # fmt: skip


def compiled(
    kernel: Any, signature: dict[str, str], sizes: dict[str, int], warps: int, odd: tuple[str, ...] = ()
) -> dict[str, Any]:
    """``odd``: numbers that 16 does not divide."""
    names = kernel.arg_names
    even = [name for name, kind in signature.items() if kind != "constexpr" and name not in odd]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in sizes.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in even},
    )
    made = compile_kernel(source, target=H100, options={"num_warps": warps})
    return {
        "memory": Counter(re.findall(r"(?:ld|st)\.global[.\w:]*", made.asm["ptx"])),
        "spilled": spilled(made.asm["ptx"]),
    }


def spilled(ptx: str) -> int:
    """Bytes, as the assembler tells them."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", str(path.with_suffix(".cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))


def main() -> None:
    softmax = triton_kernels._softmax_rows, SOFTMAX, triton_kernels.column_blocks(131_072), 32
    gated = triton_kernels.column_blocks(131_072, triton_kernels._GATED_COLUMNS)
    gate = triton_kernels._gate_at_turn, GATE, gated, 16
    block = {"block": triton_rows._COLUMNS}
    entries = {"column_stride": 1, "gated": 1, "equal": triton_rows._EQUAL, "block": triton_rows._ENTRY_COLUMNS}
    made = {
        "softmax": compiled(*softmax, odd=("rows",)),
        "softmax of 50,257 columns": compiled(*softmax, odd=("rows", "columns")),
        "gate": compiled(*gate),
        "gate of 50,257 columns": compiled(*gate, odd=("begin", "size", "columns")),
        "scale": compiled(triton_rows._scale_at_turn, SCALE, block, 4, odd=("programs",)),
        "entries": compiled(triton_rows._add_entries, ENTRIES, entries, 8, odd=("count",)),
        "hidden": compiled(triton_rows._put_hidden_gradient, HIDDEN, {"weight_column": 1, **block}, 4),
        "rounded": compiled(triton_rows._scale_into, ROUNDED, {"has_rows": 1, "has_scale": 1, **block}, 4),
    }
    for name, (told, sizes) in OTHERS.items():
        kernel = getattr(triton_rows, name, None) or getattr(triton_kernels, name)
        kinds = dict(argument.split(":") for argument in told.split())
        signature = {key: "constexpr" if key in sizes else kinds.get(key, "i32") for key in kernel.arg_names}
        made[name] = compiled(kernel, signature, sizes, 4, odd=tuple(signature))
    json.dump(made, sys.stdout)


if __name__ == "__main__":
    main()
