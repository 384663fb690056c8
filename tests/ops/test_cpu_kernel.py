"""The CPU kernel behind the op: every instruction set that runs here is as accurate as the reference.

The code path is chosen at every call, so SAGETRAIN_CPU_ISA can change inside one process.
"""

from functools import partial

import pytest
import torch

import sagetrain
from tests.kernelkit import (
    NEAREST,
    SINKS,
    Case,
    check,
    check_first_token,
    error,
    exact,
    plain,
    run,
    small_in_columns,
    small_in_rows,
)  # fmt: skip

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


# Of each result: a case in which small numbers matter to it, and steps of P where the numbers that its product rounds,
# P or dS, are just small enough for thresholds (2.4 of P, 1.1 to 1.5 of dS), and just too large.
EDGES = {
    "o": (small_in_rows, 2.3, 2.7),
    "d_q": (small_in_rows, 5.0, 7.0),
    "d_k": (small_in_columns, 0.75, 0.85),
    "d_v": (small_in_columns, 2.3, 2.7),
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("isa", ISAS)
def test_small_numbers_are_right_on_average_and_others_nearest(isa, name, monkeypatch):
    """Of P and dS, in each product: to the nearest integer many small ones would all be 0, or all 1."""
    if not runs_here(isa, monkeypatch):
        return
    build, below, above = EDGES[name]
    keys = 1 if build is small_in_columns else slice(None)
    for steps in (0.4, below, above):
        case = build(steps)
        truth, nearest, got = (
            results[name][:, :, keys] for results in (exact(case), run(NEAREST, case), run(sagetrain.attention, case))
        )
        lost, apart = error(nearest, truth), error(got, nearest)
        assert apart < lost / 1000 if steps == above else apart > lost / 10, f"{steps} steps: {apart:.2e} of {lost:.2e}"
        if steps == 0.4:
            assert error(got, truth) < lost / 2


@pytest.mark.parametrize("isa", ISAS)
def test_the_thresholds_are_those_of_the_reference(isa, monkeypatch):
    """Where both begin a row with the same float; a single one that is another would show."""
    if not runs_here(isa, monkeypatch):
        return
    case = small_in_rows(0.44)
    truth, got, same = exact(case)["o"], run(sagetrain.attention, case)["o"], run(plain, case)["o"]
    assert error(got, same) < error(same, truth) / 100


@pytest.mark.parametrize("case", SINKS, ids=str)
@pytest.mark.parametrize("attend", [sagetrain.attention, plain, partial(plain, preset="sage_sm90")])
def test_the_first_tokens_value_is_not_rounded(case, attend):
    check_first_token(attend, case)


def test_the_best_is_chosen_by_itself(monkeypatch):
    best = next(isa for isa in ISAS if runs_here(isa, monkeypatch))
    monkeypatch.delenv("SAGETRAIN_CPU_ISA")
    assert sagetrain.kernel_name() == f"cpu/{best}"


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("SAGETRAIN_CPU_ISA", "neon9")
    with pytest.raises(RuntimeError, match="must be avx512_vnni, avx2 or portable"):
        sagetrain.kernel_name()
