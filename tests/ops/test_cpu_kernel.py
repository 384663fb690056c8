"""The CPU kernel behind the op: every instruction set that runs here is as accurate as the reference.

The code path is chosen at every call, so SAGETRAIN_CPU_ISA can change inside one process.
"""

import pytest
import torch

import sagetrain
from tests.kernelkit import Case, check, run

ISAS = ("avx512_vnni", "avx2", "portable")
CASES = [
    Case(b=2, hq=4, hkv=2, tq=200, tk=200),
    Case(tq=130, tk=333, d=128, is_causal=False, kind="biased", dtype=torch.float16),
    Case(hq=2, hkv=2, tq=150, tk=150, d=40, sigma=3.0, dtype=torch.float32, cu_q=(0, 0, 33, 150), cu_k=(0, 0, 33, 150)),
    Case(tq=300, tk=300, d=128, kind="coherent", dtype=torch.float32),
]


def runs_here(isa: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Forces the instruction set; False, after checking that the refusal names what is missing, where it cannot run."""
    monkeypatch.setenv("SAGETRAIN_CPU_ISA", isa)
    try:
        return sagetrain.kernel_name() == f"cpu/{isa}"
    except RuntimeError as error:
        assert "this CPU lacks" in str(error)
        with pytest.raises(RuntimeError, match="this CPU lacks"):
            run(sagetrain.attention, CASES[0])
        return False


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_is_as_accurate_as_the_reference(isa, monkeypatch):
    if runs_here(isa, monkeypatch):
        for case in CASES:
            check(sagetrain.attention, case)
            assert all(
                torch.equal(a, b) for a, b in zip(*(run(sagetrain.attention, case).values() for _ in "ab"), strict=True)
            )
    else:
        assert isa != "portable"


def test_the_best_is_chosen_by_itself(monkeypatch):
    best = next(isa for isa in ISAS if runs_here(isa, monkeypatch))
    monkeypatch.delenv("SAGETRAIN_CPU_ISA")
    assert sagetrain.kernel_name() == f"cpu/{best}"


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SAGETRAIN_CPU_ISA", "neon9")
    with pytest.raises(RuntimeError, match="must be avx512_vnni, avx2 or portable"):
        sagetrain.kernel_name()
