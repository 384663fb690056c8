"""What the CUDA kernels owe torch and the machine: memory, repeatability, streams, graphs, compilation, two devices.

Rounding has no say here, so nearly everything is compared to the bit: but for the gradients of the default backward,
whose sums have no fixed order. The numbers are in test_gpu_kernel.py.
"""

import gc
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import sagetrain
from tests.kernelkit import NAMES, RATIO, Case, assert_same, deterministic, error, given, packed, run, same

DEVICE = "cuda"
ops = torch.ops.sagetrain
pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case(b=2, hq=4, hkv=2, tq=300, tk=300, d=128, device=DEVICE)
DICE = random.Random(0)
RAGGED = [DICE.choice([0, 1, 64, 100, 128, 130, 500]) for _ in range(40)]
SHAPES = [
    BASE,
    replace(BASE, tq=513, tk=300, d=72, dtype=FP16),  # causal: 213 rows see nothing
    replace(BASE, tq=130, tk=650, d=64, is_causal=False),
    packed(replace(BASE, d=40), [50, 0, 130, 20], [1, 74, 70, 0], lead=7, tail=10),
    packed(replace(BASE, d=64, dtype=FP16), RAGGED, [DICE.choice([n, n, 0, 257]) for n in RAGGED], lead=1),
]

both_backwards = pytest.mark.parametrize("attend", [sagetrain.attention, deterministic])

# ------------------------------------------------------------------------------------------------------------- memory


def poison(byte: int) -> None:
    """Fills with one byte what torch hands out next, whatever its size; 0xFF.. and 0x7F.. are NaN or huge numbers."""
    gc.collect()
    torch.cuda.empty_cache()
    sizes = {1 << 26: 8, 1 << 23: 16, 1 << 21: 26, 1 << 20: 64, 1 << 16: 128, 1 << 12: 512}  # fill segments exactly
    chunks = [torch.full((n,), byte, dtype=torch.uint8, device=DEVICE) for n in sizes for _ in range(sizes[n])]
    del chunks
    probes = [torch.empty(n, dtype=torch.uint8, device=DEVICE) for n in (512, 1 << 14, 1 << 21, 1 << 25)]
    assert sum(bool((x.cpu() == byte).all()) for x in probes) >= 3  # a segment that is still in use may hide one


@both_backwards
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_what_lies_in_fresh_memory_does_not_matter(case, attend):
    real, results = given(case, *case.tensors()), []
    broken = given(case, *(x * math.nan for x in real.given))
    for byte in (0x00, 0xFF, 0x7F):
        run(attend, broken)  # leaves NaN in shared memory
        poison(byte)
        results.append(run(attend, real))
    for got in results[1:]:
        assert_same(got, results[0], case, attend is deterministic)


@both_backwards
@pytest.mark.parametrize("case", [
    *SHAPES, replace(BASE, hq=16, hkv=4, tq=4096, tk=4096),
    replace(BASE, b=4, hq=16, hkv=16, tq=2000, tk=2100, d=64, is_causal=False, dtype=FP16),
], ids=str)  # fmt: skip
def test_twenty_calls_give_the_same(case, attend):
    real = given(case, *case.tensors())
    first = run(attend, real)
    same_bits = attend is deterministic or sagetrain.kernel_name(DEVICE) == "sm90"  # which is so unasked
    for i in range(2, 21):
        assert_same(run(attend, real), first, f"call {i}", same_bits)
    assert all(torch.equal(x, y) for x, y in zip(real.given, case.tensors(), strict=True))  # nothing wrote to them


def test_deterministic_algorithms_are_heeded():
    """torch.use_deterministic_algorithms, which Lightning's Trainer(deterministic=True) calls, is enough."""
    case = replace(BASE, b=1, hq=16, hkv=4, tq=2000, tk=2000, d=64)
    wanted = run(deterministic, case)
    torch.use_deterministic_algorithms(True)
    try:
        for i in range(10):
            assert_same(run(sagetrain.attention, case), wanted, f"call {i}")
    finally:
        torch.use_deterministic_algorithms(False)


def test_memory_is_linear_in_tokens():
    peaks = []
    for t in (4096, 32768):
        case = replace(BASE, b=1, tq=t, tk=t)
        real = given(case, *case.tensors())
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(sagetrain.attention, real)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] <= 9 * peaks[0]


DENSE_41 = Case(b=41, hq=64, hkv=64, tq=128, tk=128, device=DEVICE)
LENGTHS_41 = [DICE.choice([1000, 1024, 999, 1100, 640, 1]) for _ in range(41)]
PACKED_41 = packed(Case(hq=1, hkv=1, is_causal=False, device=DEVICE), LENGTHS_41, LENGTHS_41)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "dim"), [(DENSE_41, 0), (PACKED_41, 2)], ids=["batch", "packed"])
def test_more_than_two_to_the_31_elements(case, dim):
    """41 batch entries or sequences over and over: each repetition is as the first ones run alone.

    41 is odd, so that an index which wraps at a power of two meets another entry. Takes about 67 GB.
    """
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 75e9:
        pytest.skip("needs 75 GB of free GPU memory")
    alone, tensors = run(sagetrain.attention, case), case.tensors()
    times = 2**31 // tensors[0].numel() + 1
    big = given(case, *(x.repeat([times if i == dim else 1 for i in range(4)]) for x in tensors))
    if case.cu_q:
        cu = (0, *(i * case.tq + edge for i in range(times) for edge in case.cu_q[1:]))
        big = replace(big, cu_q=cu, cu_k=cu)
    assert all(x.numel() > 2**31 for x in big.given)
    got = run(sagetrain.attention, big)
    for name in NAMES:
        parts = got[name].split(alone[name].shape[dim], dim)
        wrong = [i for i, part in enumerate(parts) if not same(part, alone[name], name == "o")]
        assert len(parts) == times and not wrong, f"{name}: repetitions {wrong[:5]} of {times} differ"
    del got, big, parts
    torch.cuda.empty_cache()


def test_the_batch_may_exceed_what_a_grid_dimension_holds():
    heads = Case(hq=70000, hkv=70000, tq=5, tk=5, device=DEVICE)
    got = run(deterministic, given(heads, *(x.transpose(0, 1) for x in heads.tensors())))
    assert_same({name: x.transpose(0, 1) for name, x in got.items()}, run(deterministic, heads))


# ---------------------------------------------------------------------------------------------------- streams, graphs


@both_backwards
def test_work_goes_to_the_current_stream(attend):
    """Each stream's producer is late: whoever does not wait for it reads NaN. Two streams have nothing in common."""
    cases = [replace(BASE, seed=seed) for seed in range(2)]
    wanted = [run(attend, case) for case in cases]
    sources = [case.tensors() for case in cases]
    buffers = [[torch.empty_like(x) for x in source] for source in sources]
    streams, found = [torch.cuda.Stream() for _ in cases], []
    torch.cuda.synchronize()
    for _ in range(3):
        for stream, source, buffer in zip(streams, sources, buffers, strict=True):
            with torch.cuda.stream(stream):
                for x in buffer:
                    x.fill_(math.nan)
                torch.cuda._sleep(20_000_000)  # cycles: ten milliseconds
                for x, y in zip(buffer, source, strict=True):
                    x.copy_(y)
                found.append(run(attend, given(BASE, *buffer)))
    torch.cuda.synchronize()
    for i, got in enumerate(found):
        assert_same(got, wanted[i % 2], f"round {i // 2}, stream {i % 2}", attend is deterministic)


EDGES = [(0, 1, 1, 65, 300), (0, 100, 200, 200, 290), (7, 7, 7, 8, 9)]


@both_backwards
@pytest.mark.parametrize("edges", [[None] * 3, EDGES], ids=["dense", "packed"])
def test_cuda_graphs_replay_with_new_inputs(edges, attend):
    """Forward and backward in one graph; the edges of packed sequences are inputs like any other."""
    steps = [replace(BASE, b=1, seed=i, cu_q=e, cu_k=e) for i, e in enumerate(edges)]
    options = steps[0].options
    real = given(replace(BASE, b=1), *steps[0].tensors())

    def step_of(*x: Tensor, **_: object) -> Tensor:
        return attend(*x, **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(step_of, real)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(step_of, real)
    for step in (*steps, steps[0]):
        for x, y in zip(real.given, step.tensors(), strict=True):
            x.copy_(y)
        for name in ("cu_seqlens_q", "cu_seqlens_k") if step.cu_q else ():
            options[name].copy_(step.options[name])
        graph.replay()
        assert_same(got, run(attend, step), f"seed {step.seed}", attend is deterministic)


# -------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.slow
@pytest.mark.parametrize("case", [BASE, SHAPES[3]], ids=str)
def test_compile_fullgraph_with_inductor(case):
    def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        return deterministic(q * 2, k, v, **options)  # times two is exact: no bit may differ

    torch._dynamo.reset()
    assert_same(run(torch.compile(attend, fullgraph=True), case), run(attend, case))


@pytest.mark.parametrize("edges", [None, (0, 7, 7, 24)], ids=["dense", "packed"])
def test_opcheck(edges):
    case = replace(BASE, b=1, tq=24, tk=24, d=64, cu_q=edges, cu_k=edges)
    q, k, v, _ = case.tensors()
    tail = (0.125, True, case.options["cu_seqlens_q"], case.options["cu_seqlens_k"], False)
    torch.library.opcheck(ops.attention_forward, (*(x.clone().requires_grad_() for x in (q, k, v)), *tail))
    o, _, *saved = ops.attention_forward(q, k, v, *tail)
    for d_lse in (None, torch.randn(1, 4, 24, device=DEVICE)):
        torch.library.opcheck(ops.attention_backward, (torch.randn_like(o), d_lse, v, o, *saved, *tail))


def test_activation_checkpointing_is_the_same_to_the_bit():
    kept = run(lambda *x, **o: checkpoint(deterministic, *x, use_reentrant=False, **o), BASE)
    assert_same(kept, run(deterministic, BASE))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_casts_as_sdpa_does(dtype):
    q, k, v, _ = BASE.tensors()
    with torch.autocast(DEVICE, dtype):
        o = sagetrain.attention(q.float(), k.float(), v)
    assert o.dtype == dtype and torch.equal(o, sagetrain.attention(*(x.to(dtype) for x in (q, k, v))))


@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("padded", [False, True])
def test_llama_trains_as_in_16_bits(how, padded):
    """Two layers in Hugging Face, logits and gradients against FP32. The bar is RATIO times what 16 bits (sdpa on the
    GPU) and what INT8 (the CPU kernel, in FP32) cost: independent errors, which add in squares."""
    from tests.integrations.test_huggingface import IDS, build, results

    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :6], mask[1, 9:] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(0)

    def train(name: str, device: str) -> tuple[Tensor, Tensor]:
        half = device == DEVICE
        model = build(name).to(device, BF16 if half and how == "bfloat16" else torch.float32)
        ids, real = IDS.to(device), mask.to(device).bool()
        with torch.autocast(device, BF16, enabled=half and how == "autocast"):
            options = {"attention_mask": mask.to(device) if padded else None, "position_ids": positions.to(device)}
            logits = model(ids, use_cache=False, **options).logits
        rows = [(y[m].float(), x[m]) for y, x, m in zip(logits, ids, real, strict=True)]
        return tuple(x.cpu() for x in results(model, *zip(*rows, strict=True)))

    truth, int8 = train("eager", "cpu"), train("sage_int8", "cpu")
    sdpa, got = train("sdpa", DEVICE), train("sage_int8", DEVICE)
    for i in range(2):  # logits, gradient
        cost = math.hypot(error(sdpa[i], truth[i]), error(int8[i], truth[i]))
        assert 0 < error(got[i], truth[i]) <= RATIO * cost and not torch.equal(got[i], sdpa[i])


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_arguments_are_refused_in_words():
    q, k, v, _ = replace(BASE, b=1).tensors()
    floats, edges = [x.float() for x in (q, k, v)], torch.tensor([0, 5], dtype=torch.int32)
    on_cpu = {"cu_seqlens_q": edges, "cu_seqlens_k": edges}
    for arguments, options, kind, words in (
        (floats, {}, TypeError, "q is torch.float32: the cuda kernels take bfloat16, float16; cast"),
        ((q, k.float(), v), {}, TypeError, "cast them to one dtype"),
        ((q, k.cpu(), v), {}, ValueError, "q is on cuda:0 but k is on cpu: move them to one device"),
        ((q, k, v), on_cpu, ValueError, r"on cpu: expected int32 \[N \+ 1\] on cuda:0"),
    ):
        with pytest.raises(kind, match=words):
            sagetrain.attention(*arguments, **options)
    tail = (0.125, True, None, None, False)
    for arguments, words in ((floats, "float32 is for the CPU only"), ((q, k.cpu(), v.cpu()), "one device")):
        with pytest.raises(RuntimeError, match=words):
            ops.attention_forward(*arguments, *tail)


PROGRAM = """
import sys, torch, sagetrain
ops = torch.ops.sagetrain
edges = [torch.tensor(eval(e), dtype=torch.int32, device="cuda") for e in sys.argv[1:]]
x = torch.randn(1, 2, 130, 64, device="cuda").bfloat16()
o, _, *saved = ops.attention_forward(x, x, x, 0.125, True, edges[0], edges[1], False)
torch.cuda.synchronize()
ops.attention_backward(x, None, x, o, *saved, 0.125, True, edges[2], edges[3], False)
torch.cuda.synchronize()
print("came to its end")
"""


def test_cu_seqlens_out_of_order_or_range_stop_the_program():
    """Their values are read on the device only. In processes of their own: the error takes the CUDA context along."""
    good, bad = "0, 40, 90, 130", ["0, 90, 40, 130", "-1, 40, 90, 130", "0, 40, 90, 131", "0, 40, 1 << 30, 130"]
    calls = [[good] * 4, *([e, *[good] * 3] for e in bad), *([good, e, good, good] for e in bad[::2]),
             [good, good, bad[0], good], [good, good, good, bad[0]]]  # fmt: skip
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM, *call], cwd=Path(__file__).parents[2], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for call in calls
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert running[0].returncode == 0 and "came to its end" in outputs[0], outputs[0]
    for call, process, output in zip(calls[1:], running[1:], outputs[1:], strict=True):
        assert process.returncode != 0 and "came to its end" not in output, f"{call} was accepted: {output}"
        assert "cu_seqlens" in output, f"{call}: no word on what is wrong: {output}"


def test_kernel_name():
    major, _ = torch.cuda.get_device_capability()
    chosen = os.environ.get("SAGETRAIN_GPU_KERNEL", "sm90" if major == 9 else "sm80")
    assert sagetrain.kernel_name("cuda") == chosen
    assert sagetrain.kernel_name("cuda:0") == sagetrain.kernel_name(0)


ASK = "import sagetrain; print(sagetrain.kernel_name('cuda'))"


def test_the_environment_can_choose_an_older_kernel():
    """In processes of their own: each keeps the one that it chose first."""

    def ask(kernel: str) -> subprocess.CompletedProcess:
        env = os.environ | {"SAGETRAIN_GPU_KERNEL": kernel}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.run([sys.executable, "-c", ASK], cwd=Path(__file__).parents[2], env=env, text=True, **streams)

    older, none = ask("sm80"), ask("sm70")
    assert older.returncode == 0 and older.stdout.split()[-1] == "sm80", older.stdout
    assert none.returncode and re.search("sm70.*SAGETRAIN_GPU_KERNEL", none.stdout), none.stdout


def test_a_process_keeps_its_kernel(monkeypatch):
    chosen = sagetrain.kernel_name("cuda")
    monkeypatch.setenv("SAGETRAIN_GPU_KERNEL", "sm80" if chosen == "sm90" else "sm70")
    assert sagetrain.kernel_name("cuda") == chosen
    run(sagetrain.attention, BASE)


def test_many_launches_of_random_shapes_come_to_an_end():
    """10,000 forwards and as many backwards, 10 of each random shape, with the same bits: a lost wakeup hangs, a race
    differs."""
    dice = random.Random(1)
    for _ in range(1000):
        hkv, tq = dice.choice([1, 2, 3]), dice.choice([1, 63, 128, 190, 200, 385, 700, 1500])
        case = Case(tq=tq, tk=dice.choice([tq, tq, 1, 129, 500]), is_causal=dice.random() < 0.7, device=DEVICE)
        if dice.random() < 0.3:
            lengths = [dice.choice([0, 1, 64, 130, 300]) for _ in range(dice.randint(1, 9))]
            case = packed(case, lengths, [n if dice.random() < 0.8 else 77 for n in lengths])
        b, d, options = 1 if case.cu_q else dice.choice([1, 2]), dice.choice([64, 128]), case.options
        q = torch.randn(b, hkv * dice.choice([1, 2, 4]), case.tq, d, device=DEVICE, dtype=BF16)
        k, v = torch.randn(2, b, hkv, case.tk, d, device=DEVICE, dtype=BF16)
        found = [sagetrain.attention(q, k, v, return_lse=True, **options) for _ in range(10)]
        leaves = [x.requires_grad_() for x in (q, k, v)]
        o, lse = sagetrain.attention(*leaves, return_lse=True, deterministic=True, **options)
        towards = torch.randn_like(o), torch.randn_like(lse)
        grads = [torch.autograd.grad((o, lse), leaves, towards, retain_graph=True) for _ in range(10)]
        for ten in found, grads:
            assert all(torch.equal(x, y) for one in ten[1:] for x, y in zip(one, ten[0], strict=True)), (case, b, d)


# -------------------------------------------------------------------------------------------------------- two devices


@both_backwards
@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than two CUDA GPUs here")
def test_every_device_is_its_own(attend):
    """Calls on two devices in turn, while device 0 is the current one, give the bits of each device by itself."""
    cases = [replace(case, device=f"cuda:{i}") for case in SHAPES for i in (1, 0)]
    found = [run(attend, case) for _ in range(3) for case in cases]
    assert torch.cuda.current_device() == 0
    for i, case in enumerate(cases):
        with torch.cuda.device(case.device):
            alone = run(attend, case)
        for got in found[i :: len(cases)]:
            assert got["o"].device == torch.device(case.device)
            assert_same(got, alone, case, attend is deterministic)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        for one, zero in zip(found[::2], found[1::2], strict=True):
            assert_same({name: x.to("cuda:0") for name, x in one.items()}, zero, "devices", attend is deterministic)
    with pytest.raises(ValueError, match="one device"):
        attend(cases[0].tensors()[0], *cases[1].tensors()[1:3])
