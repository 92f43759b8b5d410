"""Builds every kernel for a GPU that need not be there; prints one JSON line a build. Run without TRITON_INTERPRET."""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from fastcure_kernels.rows import reduction_launch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ELEMENTWISE = {"BLOCK": 1024, "num_warps": 4}
NHWC = {"only": ("fp32", "bf16"), "LAST": True, "ROWS": 32, "CHANNELS": 64, "num_warps": 4}
FORWARD = {**NHWC, "FIRST": 2, "WITH_A": False, "WITH_BC": False, "GATE_IN": False, "WITH_RESIDUAL": True}
KERNELS = {  # kernel, and a word where there are several of it -> its launch options at N = 150528
    "bias_relu._gated_sum_kernel": {**ELEMENTWISE, "READ": True, "WRITE": False},
    "bias_relu._gated_sum_kernel channels-last": {**ELEMENTWISE, "INNER": 1, "READ": False, "WRITE": True},
    "batch_norm._combine_kernel": {**NHWC, "FIRST": 0, "WITH_A": True, "WITH_BC": True, "GATE_IN": True, "GATE_OUT": 0},
    "batch_norm._combine_kernel that-writes-bits": {**FORWARD, "GATE_OUT": 5},
    "batch_norm._combine_kernel that-reads-bits": {**FORWARD, "FIRST": 0, "WITH_A": True, "GATE_OUT": 3},
    "channel_sums._statistics_kernel": NHWC,
    "channel_sums._sums_kernel": {**NHWC, "GATE": 1, "WITH_OTHER": True, "WITH_MORE": False},
    "channel_sums._sums_kernel in-two-parts": {**NHWC, "GATE": 3, "WITH_OTHER": False, "WITH_MORE": True},
    "channel_sums._finish_sums_kernel": {
        "only": ("fp32",),
        "PARTS": 512,
        "CHANNELS": 8,
        "SUMS": 3,
        "SECOND": True,
        "num_warps": 4,
    },
    "direction_step._direction_step_kernel": reduction_launch(150528),
    "difference_sqnorm._forward_kernel": reduction_launch(150528),
    "difference_sqnorm._backward_kernel": ELEMENTWISE,
    "linf_step._linf_step_kernel": ELEMENTWISE,
    "gelu._double_backward_kernel": {**ELEMENTWISE, "TANH": False},
    "gelu._double_backward_kernel tanh": {**ELEMENTWISE, "TANH": True},
    "row_norm._double_backward_kernel": {"only": ("fp32", "bf16"), "ROWS": 8, "BLOCK": 256, "num_warps": 4},
    "l2_step._l2_step_kernel": reduction_launch(150528),
}
ARITHMETIC_POINTERS = {"h_ptr", "w_ptr", "eps_ptr", "step_ptr"}  # of the dtype of the arithmetic, not the data's
ARITHMETIC_POINTERS |= {"part_ptr", "stats_ptr", "coef_ptr", "sums_ptr", "v_ptr", "m_ptr", "r_ptr"}


def signature(name, dtype, options):
    """Argument types and constants of a launch on samples of a length that 16 divides."""
    module, function = name.split()[0].split(".")
    fn = importlib.import_module(f"fastcure_kernels.{module}").__dict__[function].jitted
    wide = "fp64" if dtype == "fp64" else "fp32"
    arithmetic = ARITHMETIC_POINTERS - ({"v_ptr", "w_ptr"} if module in ("gelu", "row_norm") else set())
    constants = {"LOWER": 0.0, "UPPER": 1.0, "WANT_A": True, "WANT_B": True}
    constants |= {"WITH_B": True, "WITH_BIAS": True, "WITH_RESIDUAL": False, "WIDE": dtype == "fp64"}
    constants |= {k: v for k, v in options.items() if k not in ("num_warps", "only")}
    types = {}
    for arg in fn.arg_names:
        if arg in constants:
            types[arg] = "constexpr"
        elif arg in arithmetic or (arg == "out_ptr" and name.startswith("difference_sqnorm")):
            types[arg] = f"*{wide}"
        elif arg == "mask_ptr":
            types[arg] = "*u8"
        else:
            types[arg] = f"*{dtype}" if arg.endswith("_ptr") else "i32"
    return fn, types, constants


def build(name, dtype, target, options):
    fn, types, constants = signature(name, dtype, options)
    names = list(types)
    source = ASTSource(
        fn,
        types,
        {(names.index(k),): v for k, v in constants.items() if k in types},
        {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if types[arg] != "constexpr"},
    )
    options = {"num_warps": options["num_warps"], "enable_fp_fusion": False}
    return triton.compile(source, target=target, options=options)


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def facts(built):
    if "cubin" not in built.asm:
        asm = built.asm["amdgcn"]
        found = {
            k: int(v) for k, v in re.findall(r"\.(\w*spill_count|private_segment_fixed_size|vgpr_count):\s*(\d+)", asm)
        }
        return {
            "registers": found.pop("vgpr_count"),
            "spilled": sum(found.values()),
            "wide_loads": asm.count("load_dwordx4"),
            "wide_stores": asm.count("store_dwordx4"),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    found = {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spilled": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage))),
    }
    for kind, name in (("ld", "wide_loads"), ("st", "wide_stores")):
        found[name] = len(re.findall(rf"\b{kind}\.global[.\w:]*\.v(?:4\.[bfu]32|2\.[bfu]64)", built.asm["ptx"]))
    return found


def main():
    for target in sys.argv[1:]:
        for dtype in ("fp32", "bf16") + (("fp64",) if target == "sm_90" else ()):
            for name, options in KERNELS.items():
                if dtype not in options.get("only", dtype):
                    continue
                built = build(name, dtype, TARGETS[target], options)
                found = facts(built)
                print(json.dumps({"kernel": name, "dtype": dtype, "target": target, **found}), flush=True)


if __name__ == "__main__":
    main()
