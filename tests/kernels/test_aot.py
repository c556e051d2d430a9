"""The head's kernels, compiled ahead of time for GPUs that need not be there: no spills, tensor cores, shared memory.

A recorder takes the kernel's place while the real launcher runs on a small CPU problem; what it was called with gives
signature, constants and alignments, so that what is compiled here is what a launch compiles. The cubin is then read
with the two programs that come with Triton. Asserted are presence and zero, never a count that another compiler would
change.
"""

import contextlib
import io
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from entrocraft.kernels import linear_logprob_launch, linear_logprob_triton  # noqa: E402
from entrocraft.kernels.dlogits_kernels import dlogits_kernel, stored_dlogits_kernel  # noqa: E402
from entrocraft.kernels.head import Exponentials, Head, HeadOptions, Sinks  # noqa: E402
from entrocraft.kernels.linear_logprob_launch import Tile, Tiles  # noqa: E402
from entrocraft.kernels.row_stats import RowCoefficients  # noqa: E402
from entrocraft.kernels.stats_kernels import merge_kernel, stats_kernel  # noqa: E402

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
KERNELS: dict[str, Any] = {
    kernel.__name__: kernel for kernel in (stats_kernel, merge_kernel, dlogits_kernel, stored_dlogits_kernel)
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}


class Recorder:
    """Stands where a kernel stands, and keeps what it is called with."""

    def __init__(self, name: str, calls: dict[str, dict[str, Any]]) -> None:
        self.name, self.calls = name, calls

    def __getitem__(self, grid):
        names = KERNELS[self.name].arg_names

        def launch(*args, **kwargs):
            self.calls[self.name] = dict(zip(names, args, strict=False)) | kwargs

        return launch


def recorded_launches(
    monkeypatch, capability: int, *, dtype: torch.dtype = torch.bfloat16, H: int = 2560, **options
) -> dict[str, dict[str, Any]]:
    """The arguments of each kernel in a forward that stores exponentials of all rows, and a backward from some of them.

    Sizes are divisible by 16 where those of real heads are; what a kernel is compiled for depends on nothing else.
    """
    calls: dict[str, dict[str, Any]] = {}
    monkeypatch.setattr(linear_logprob_launch, "capability", lambda index: capability)
    for name in KERNELS:
        monkeypatch.setattr(linear_logprob_triton, name, Recorder(name, calls))
    T, V = 272, 1040
    temperature = torch.ones(T) if options.pop("row_temperature", False) else 1.0
    store = options.pop("store", False)
    bias_V = torch.zeros(V, dtype=dtype) if options.pop("bias", False) else None
    head = Head(
        torch.zeros(T, H, dtype=dtype), torch.zeros(V, H, dtype=dtype), bias_V, torch.zeros(T).long(), temperature,
        HeadOptions(**options),
    )  # fmt: skip
    room = Exponentials.empty(head, T, linear_logprob_triton.tile_columns(head)) if store else None
    linear_logprob_triton.statistics(head, room)
    if store and room is not None:
        room = room.pick(torch.arange(16))
    rows = RowCoefficients(*(torch.zeros(T) for _ in range(5)))
    linear_logprob_triton.gradients(head, rows, Sinks(torch.zeros(T, H), None, None), room)
    return calls


def compiled(name: str, arguments: dict[str, Any], capability: int) -> tuple[Any, str]:
    """The kernel compiled for these arguments as a launch would, and the log of the assembler."""
    kernel = KERNELS[name]
    constexprs = {p.name for p in kernel.params if p.is_constexpr}
    signature, constants, attributes = {}, {}, {}
    for index, argument in enumerate(kernel.arg_names):
        value = arguments[argument]
        if argument in constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[argument], constants[(index,)] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            signature[argument] = f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, Tensor):
            signature[argument], attributes[(index,)] = f"*{NAMES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[argument] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
    log = io.StringIO()
    # The log of the assembler's own run: another run could be another binary, with other flags.
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        source = ASTSource(kernel, signature, constants, attributes)
        result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return result, log.getvalue()


def facts(result: Any, log: str) -> dict[str, Any]:
    """What the cubin needs and is made of."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", file.name)
        code = _output("nvdisasm", "-c", file.name)
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used, usage
    wgmma = re.findall(r"\bHGMMA\.[^;]*", code)
    return {
        "registers": int(used[1]),
        "stack": int(used[2]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": result.metadata.shared,
        "wgmma": len(wgmma),
        "serial": bool(wgmma) and all("gsb0" in one for one in wgmma),
        "warnings": sorted(set(re.findall(r"C75\d\d", log))),
        "logged": "bytes stack frame" in log,
        "hmma": len(re.findall(r"\bHMMA\.", code)),
        "tcgen05": len(re.findall(r"\bUTC\w*MMA", code)),
        "tma": len(re.findall(r"\bUTMALDG", code)),
        "async_copies": len(re.findall(r"\bLDGSTS", code)),
        "instructions": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", code, re.MULTILINE)),
    }


def _output(program: str, *arguments: str) -> str:
    run = subprocess.run([BIN / program, *arguments], capture_output=True, text=True, check=True)
    return run.stdout


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing compiled before may answer: a cache hit has no log."""
    if not (BIN / "nvdisasm").exists() or not (BIN / "cuobjdump").exists():
        pytest.skip(f"this Triton brings no nvdisasm and cuobjdump in {BIN}")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


OPTIONS = {
    "plain": {},
    "rich": {"collision": True, "varentropy": True, "argmax": True, "store": True},
    "argmax": {"argmax": True},
    "softcap": {"softcap": 30.0},
    "temperature": {"row_temperature": True},
    "bent": {"bias": True, "softcap": 30.0, "row_temperature": True, "collision": True, "store": True},
}
LAUNCHES = [
    (capability, kernel, options)
    for capability in (80, 90, 100)
    for kernel, options in (
        ("stats_kernel", "plain"), ("stats_kernel", "rich"), ("stats_kernel", "bent"),
        ("dlogits_kernel", "plain"), ("dlogits_kernel", "bent"),
    )
] + [
    # Little beside the products: the assembler saves registers here, and once spilled for it.
    (100, "stats_kernel", "argmax"), (100, "stats_kernel", "softcap"), (90, "stats_kernel", "temperature"),
    (120, "stats_kernel", "bent"), (120, "dlogits_kernel", "plain"),
    (90, "merge_kernel", "rich"), (90, "stored_dlogits_kernel", "bent"),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "kernel", "options"), LAUNCHES, ids=str)
def test_compiles_clean(monkeypatch, capability, kernel, options):
    launches = recorded_launches(monkeypatch, capability, **OPTIONS[options])
    found = facts(*compiled(kernel, launches[kernel], capability))
    print(triton.__version__, capability, kernel, options, found)
    assert found["logged"], "the assembler's log was not captured"
    assert (found["stack"], found["spills"]) == (0, 0)
    assert 0 <= found["shared"] <= SHARED_BYTES[capability]
    if kernel in ("merge_kernel", "stored_dlogits_kernel"):
        return
    if capability in (80, 120):
        assert found["hmma"] > 0 < found["async_copies"]
    elif capability == 90:
        assert found["wgmma"] > 0 < found["tma"]
        assert found["hmma"] == 0
        assert not found["serial"]
        assert found["warnings"] == []
    else:
        assert found["tcgen05"] > 0 < found["tma"]


@pytest.mark.parametrize("kernel", ["stats_kernel", "dlogits_kernel"])
def test_before_capability_8_the_tiles_of_8_compile_without_tensor_cores(monkeypatch, kernel):
    """bf16 has no tensor cores on Turing: right, and slow. It has 64 KiB of shared memory."""
    launches = recorded_launches(monkeypatch, 80)
    found = facts(*compiled(kernel, launches[kernel], 75))
    assert found["hmma"] == 0
    assert 0 < found["shared"] <= 64 * 1024


def test_fp32_operands_and_odd_strides_compile_clean(monkeypatch):
    # H of 2,561 has no 16-byte pitch: pointers and masks, on a chip that would otherwise take descriptors.
    for dtype, H in ((torch.float32, 2560), (torch.bfloat16, 2561)):
        launches = recorded_launches(monkeypatch, 90, dtype=dtype, H=H)
        found = facts(*compiled("stats_kernel", launches["stats_kernel"], 90))
        assert (found["stack"], found["spills"], found["tma"]) == (0, 0, 0)
        assert (found["wgmma"] > 0) == (dtype == torch.bfloat16)


def test_a_bad_tile_is_seen(monkeypatch):
    # Four warps hold half of a 128 x 256 accumulator each: it spills, and every wgmma waits for the last.
    bad = Tile(128, 256, 64, 4, 3, tma=True)
    monkeypatch.setitem(linear_logprob_launch.FORWARD_TILES, 90, Tiles(bad, bad))
    found = facts(*compiled("stats_kernel", recorded_launches(monkeypatch, 90)["stats_kernel"], 90))
    assert found["stack"] > 0 < found["spills"]
    assert found["serial"]


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_stride_of_an_operand_is_multiplied_in_32_bits(monkeypatch, kernel):
    # Fifteen thousand rows of 152k exponentials are 2^31 elements.
    launches = recorded_launches(monkeypatch, 80, **OPTIONS["bent"])
    text = compiled(kernel, launches[kernel], 80)[0].asm["ttir"]
    products = [line for line in text.splitlines() if "arith.muli" in line]
    constants = set(re.findall(r"(%\w+) = arith.constant", text))
    assert [line for line in products if re.search(r": (tensor<.*x)?i64", line)]
    for line in products:
        if re.search(r": (tensor<.*x)?i32", line):
            # Numbers of tiles, constants, and rows inside a tile times the pitch of a buffer of our own fit.
            factors = set(re.findall(r"%\w+", line.split("=")[1]))
            assert factors & constants or re.search(r"^\s*%(tiles|in_group|e_ptrs|dz_ptrs)", line), line
