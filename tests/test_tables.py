"""README's and docs' numbers are those of benchmarks/results, and the check says so when one is not."""

import csv
import json
import re
from pathlib import Path

import pytest

from benchmarks import common, tables

FILES = sorted(tables.RESULTS.glob("*.csv"))


def test_pages_say_what_the_rows_say() -> None:
    assert not [f"{path.name}: {fault}" for path in tables.pages() for fault in tables.faults(path.read_text())]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with a table and a phrase of the newest rows."""
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing to check\n")
    page = tmp_path / "docs" / "kernel.md"
    page.write_text(
        "<!-- speed: attention-sm90 device=H100 part=both -->\n<!-- end -->\nReaches "
        "<!-- ratio: attention-sm90 device=H100 part=both d=64 mask=causal b=1 t=8192 peer=fa4 --><!-- end -->.\n"
    )
    assert tables.main([]) == 0
    return page


def test_a_number_that_is_not_in_the_rows_is_named(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = checkout.read_text()
    assert tables.main(["--check"]) == 0
    in_table, in_prose = re.search(r"\d\.\d\dx \(", page)[0], re.search(r"Reaches .*?-->(\d\.\d\dx)<", page)[1]
    for number, wrong, mark in (
        (in_table, "9.99x (", "speed: attention-sm90 device=H100 part=both"),
        (f">{in_prose}<", ">9.99x<", "ratio: attention-sm90"),
    ):
        checkout.write_text(page.replace(number, wrong, 1))
        capsys.readouterr()
        assert tables.main(["--check"]) == 1
        said = capsys.readouterr().out
        assert "docs/kernel.md" in said and mark in said and "9.99x" in said
        assert "9.99x" in checkout.read_text(), "a check writes nothing"
        assert tables.main([]) == 0 and checkout.read_text() == page


@pytest.mark.parametrize("broken", [("ratio:", "ration:"), ("<!-- end -->.", ".")])
def test_a_mark_that_would_never_be_checked_is_named(
    checkout: Path, broken: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    checkout.write_text(checkout.read_text().replace(*broken))
    capsys.readouterr()
    assert tables.main(["--check"]) == 1
    assert "docs/kernel.md: <!-- rati" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("attention-sm70 device=H100 part=both peer=fa4", "No such file"),
        ("attention-sm90 device=H100 part=both", "missing 1 required positional argument: 'peer'"),
        ("attention-sm90 device=H100 part=both peer=fa4 shade=3", "no column 'shade'"),
        ("attention-sm90 device=H100 part=both peer=fa4 mask=full+", "could not convert string to float"),
        ("attention-sm90 device=H100 part=both peer", "length 1; 2 is required"),
        ("attention-sm90 device=H100 part=both peer=fa4 t=8192 odd=1", "no column 'odd'"),
    ],
)
def test_a_mark_that_cannot_be_made_is_named(
    checkout: Path, options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    page = checkout.read_text() + f"And <!-- ratio: {options} -->1.00x<!-- end -->.\n"
    checkout.write_text(page)
    capsys.readouterr()
    for words in (["--check"], []):
        assert tables.main(words) == 1
        out = capsys.readouterr().out
        assert out.startswith(f"docs/kernel.md: <!-- ratio: {options} --> cannot be made: ") and said in out
    assert checkout.read_text() == page


@pytest.mark.parametrize("content", [None, "", "shape,mask\n", "\0\xff", "device,shape\nH100,1x2x3x4x5\n"], ids=repr)
def test_rows_that_are_not_there_are_named(
    checkout: Path, content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    if content is not None:
        (tmp_path / "attention-sm90.csv").write_text(content, encoding="latin-1")
    capsys.readouterr()
    assert tables.main(["--check"]) == 1
    assert (
        "docs/kernel.md: <!-- speed: attention-sm90 device=H100 part=both --> cannot be made" in capsys.readouterr().out
    )


def test_a_comment_that_would_cut_a_paragraph_is_named(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkout.write_text(checkout.read_text().replace("Reaches <!--", "Reaches\n<!--"))
    assert tables.main(["--check"]) == 1
    assert "begins a line" in capsys.readouterr().out


def test_a_new_row_changes_the_page(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tables.read(tables.RESULTS / "attention-sm90.csv")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    new = next(
        r for r in rows if r["backend"] == tables.OURS and r["shape"] == "1x32x8x8192x64" and "H100" in r["device"]
    )
    common.write(rows, tmp_path / "attention-sm90.csv")
    assert tables.main(["--check"]) == 0
    common.write([new | {"commit": "later", "both_ms": "1.2345"}], tmp_path / "attention-sm90.csv")
    assert tables.main(["--check"]) == 1
    tables.main([])
    assert "1.23" in checkout.read_text() and "later" in checkout.read_text()
    assert len(tables.read(tmp_path / "attention-sm90.csv")) == len(rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_keep_the_newest_rows_only(path: Path) -> None:
    rows = tables.read(path)
    assert rows and tables.newest(rows, path.stem.split("-")[0]) == rows


def test_the_newest_of_a_case_is_the_last_that_was_measured() -> None:
    def row(device: str, commit: str, shape: str, name: str) -> dict[str, str]:
        return {"device": device, "commit": commit, "shape": shape, "direction": "forward", "pass": name}

    old = [row("A", "1", "s", "sum"), row("A", "1", "s", "gone"), row("A", "1", "t", "sum"), row("B", "1", "s", "sum")]
    new = [row("A", "2", "s", "sum") | {"us": "5"}, row("A", "2", "s", "sum") | {"us": "6"}]
    kept = tables.newest(old + new, "passes")
    assert kept == [old[2], old[3], new[1]]  # a kernel that is no more goes with its case, other devices stay


def test_ratios_are_those_of_the_run() -> None:
    """They are made of the milliseconds; where both were measured together the row has the ratio too."""
    rows = tables.chosen("attention-sm90", {"device": "H100", "part": "both"})
    seen = 0
    for case in tables.by_case(rows).values():
        for peer in tables.peers_of(rows, None):
            if given := case[tables.OURS].get(f"both_x_{peer}"):
                assert tables.times(case[tables.OURS], case[peer]) == pytest.approx(float(given), abs=2e-3)
                seen += 1
    assert seen > 30


def test_what_cannot_be_chosen_is_said() -> None:
    with pytest.raises(ValueError, match="2 devices: say device="):
        tables.made("speed", "attention-sm90 part=both")
    with pytest.raises(ValueError, match="no row of attention-sm90.csv"):
        tables.made("ratio", "attention-sm90 device=H100 part=both t=7 peer=fa4")


def test_a_benchmark_without_a_case_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="benchmark 'heat' is none of attention, .*tables.CASES"):
        common.write([{"device": "H100", "joules": 3}], tmp_path / "heat-sm90.csv")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0356, "0.0356"), (1.6649, "1.66"), (12.25, "12.2"), (159.51, "160"), (1954.3, "1,954")]
)
def test_three_digits(value: float, text: str) -> None:
    assert tables.digits(value) == text


def test_rows_say_what_compiled_the_kernels_and_how_fast_the_gpu_may_go(tmp_path: Path) -> None:
    start = common.conditions("cpu")
    assert {"nvcc", "driver", "sm_mhz", "memory_mhz"} <= start.keys()
    assert start["driver"] == start["sm_mhz"] == ""
    path = tmp_path / "ablation-cpu.csv"
    path.write_text("device,commit,case,d,tokens,variant\nold,1,normal,64,2048,sage\n")
    common.write([start | {"case": "normal", "d": 64, "tokens": 2048, "variant": "sage"}], path)
    with path.open(newline="") as file:
        old, new = csv.DictReader(file)
    assert old["nvcc"] == "" and new["nvcc"] == start["nvcc"] and old["device"] == "old"


def test_a_steps_ratios_are_those_of_the_run() -> None:
    seen = 0
    for case in tables.by_case(tables.chosen("pretrain-sm90", {"device": "H200"})).values():
        for name, row in case.items():
            if given := case[tables.OURS].get(f"x_{name}"):
                assert tables.times(case[tables.OURS], row) == pytest.approx(float(given), abs=2e-3)
                seen += 1
    assert seen > 10


STEP = {
    "device": "H100", "commit": "1", "recipe": "r", "tokens": "8192", "data": "packed", "checkpointing": "none",
    "precision": "bf16-mixed", "linear": "", "optimizer": "adamw", "refused": "", "handicap": "", "ran": "x",
    "tokens_per_s": "2000", "micro_ms": "4", "mfu": "0.5", "peak_gib": "30", "ms_products": "10", "ms_loss": "4",
    "ms_other": "1", "ms_copies": "0.5", "ms_optimizer": "0.5", "ms_idle": "5",
}  # fmt: skip
STEPS = [
    STEP | {"attention": "fa4", "step_ms": "90", "ms_attention_forward": "5"},
    STEP | {"attention": "sage_int8", "step_ms": "100"}
    | {"ms_attention_forward": "1", "ms_attention_backward": "2", "ms_quantise": "1"},
    STEP | {"attention": "varlen", "step_ms": "150", "ms_attention_forward": "50"},
    STEP | {"attention": "sdpa", "step_ms": "80", "handicap": "a mask", "ran": "SDPA cuDNN, masked"},
    STEP | {"attention": "fa3", "step_ms": "", "refused": "ValueError: fa3 needs a package (pip); or another"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (
            "step",
            (
                "| 8,192 packed | INT8 | 2,000 | 4.00 | 50% | 30.0 |  |",
                "|  | SDPA's choice: cuDNN, masked \\* | 2,000 | 4.00 | 50% | 30.0 | 0.80x |",
                "|  | FA4 | 2,000 | 4.00 | 50% | 30.0 | 0.90x |",
                "|  | torch varlen | 2,000 | 4.00 | 50% | 30.0 | 1.50x |",
                "\\* a mask. Refused: fa3 needs a package. Measured at commit 1.",
            ),
        ),
        (
            "breakdown",  # ours, and of the others the fastest that is a baseline
            (
                "| 8,192 packed | INT8 | 1.00 | 2.00 | 1.00 | 10.0 | 4.00 | 2.00 | 5.00 | 25.0 | 20% | 1.25x |",
                "|  | FA4 | 5.00 | – | – | 10.0 | 4.00 | 2.00 | 5.00 | 26.0 | 24% | 1.31x |",
                "Measured at commit 1.",
            ),
        ),
    ],
)
def test_a_step_line_by_line(
    kind: str, lines: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    common.write(STEPS, tmp_path / "pretrain-sm90.csv")
    assert tuple(line for line in tables.made(kind, "pretrain-sm90").split("\n") if line)[2:] == lines


def test_loss_without_bf16_is_held_against_the_first_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "run").mkdir()
    rows = [
        f"r,{arm},0,{step},{step}00,{loss},{speed},{wait}"
        for arm, loss, speed, wait in (("sage_int8 a=1", 2, 10, 0.1), ("sage_int8 a=2", 2.5, 20, 0.2))
        for step in (1, 2)
    ]
    (tmp_path / "run" / "metrics.csv").write_text(
        "\n".join(["recipe,arm,seed,step,tokens,loss,tokens_per_s,data_wait", *rows])
    )
    assert "| INT8 a=1 | 1 | 2 | 2.0000 |  |  | 10 |\n| INT8 a=2 | 1 | 2 | 2.5000 | +0.5000 |  | 20 |" in tables.made(
        "loss", "run"
    )
    assert "| INT8 a=1 | 1 | 2 | 2.0000 |  |  |\n" in tables.made("loss", "run speed=no")
    assert tables.made("typical", "run column=data_wait") == "0.150"


def test_what_a_comparison_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "run").mkdir()
    found = {"gap": 0.01234, "gap_interval": [-0.1, 0.2], "gap_trend": -0.5, "gap_trend_interval": [-0.7, -0.3]}
    arms = {"sage_int8": found, "paper": {"gap": 1.0, "gap_interval": None}}
    (tmp_path / "run" / "comparison.json").write_text(json.dumps({"arms": arms, "band": 0.04321}))
    assert tables.made("compared", "run what=band") == "0.0432"
    assert tables.made("compared", "run what=gap") == "+0.0123 (95%: -0.1000 to +0.2000)"
    assert tables.made("compared", "run what=gap_trend") == "-0.5000 (95%: -0.7000 to -0.3000)"
    for wrong in ("what=gap arm=paper", "what=gap arm=none", "what=speed", ""):
        with pytest.raises(ValueError, match="cannot be made"):
            tables.made("compared", f"run {wrong}")


def test_bias_of_int8_and_bf16_first_and_of_which_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head = "device,commit,model,text,seq_len,batch_size,tokens,arm,part,bias,each\n"
    arms = (("old", "sage_int8@forward"), ("new", "sage_int8"), ("old", "sage_int8@backward"), ("new", "bf16"))
    rows = [f"H200,{commit},m,t,8,1,64,{arm},all,0.001,0.01\n" for commit, arm in arms]
    (tmp_path / "bias-x.csv").write_text(head + "".join(rows))
    first, second, *_, note = tables.made("bias", "bias-x").strip().splitlines()[2:]
    assert (first, second) == ("| INT8 | 0.00100 | 0.0100 |", "| BF16 | 0.00100 | 0.0100 |")
    assert note == "After 64 tokens, at commit new; `sage_int8@forward` and `sage_int8@backward` at old."


def test_fine_tuned_models_by_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head = "device,commit,model,task,steps,arm,seed,metric,n,val_loss,before,after,other\n"
    lines = [
        f"H200,abc,m,drop,700,{arm},{seed},{metric},1600,{loss + seed / 100},{before},{after + seed / 100},{other}\n"
        for arm, loss, before, after, other in (("bf16", 1.5, 0.1, 0.3, 0.25), ("sage_int8", 1.502, 0.11, 0.31, 0.27))
        for seed in (0, 1, 2)
        for metric in ("em", "f1")
    ]
    (tmp_path / "finetune-x.csv").write_text(head + "".join(lines))
    said = tables.made("finetune", "finetune-x of=loss")
    assert "| drop | 3 | 1.5100 ± 0.0100 | 1.5120 ± 0.0100 | +0.0020 ± 0.0000 |" in said and said.count("drop") == 1
    said = tables.made("finetune", "finetune-x of=score")
    cells = "| 1,600 | 10.0 / 11.0 | 31.0 ± 1.0 | 32.0 ± 1.0 | 25.0 ± 0.0 | 27.0 ± 0.0 | -4.0 ± 1.0 |"
    assert f"| drop, em {cells}" in said and f"| drop, f1 {cells}" in said
    (tmp_path / "finetune-x.csv").write_text(head + "".join(lines[:-2]))
    with pytest.raises(ValueError, match="drop: the arms have other seeds"):
        tables.made("finetune", "finetune-x of=score")


def test_biases_after_the_most_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head = "device,commit,model,text,seq_len,batch_size,tokens,arm,part,bias,each\n"
    rows = [
        f"EPYC,abc,m,t,512,2,{tokens},{arm},{part},{bias},3.00e-02\n"
        for tokens, bias in ((2048, 0.5), (4096, 2e-3))
        for arm in ("sage_int8", "paper")
        for part in ("all", "q")
    ]
    (tmp_path / "bias-x.csv").write_text(head + "".join(rows))
    said = tables.made("bias", "bias-x model=m")
    assert "| bias, all | bias, q |" in said and "4,096 tokens, at commit abc" in said
    assert "| INT8 | 0.00200 | 0.00200 | 0.0300 |" in said and "| `paper` | 0.00200" in said
    (tmp_path / "bias-x.csv").write_text(head + "".join(rows[:-1]) + rows[-1].replace("0.002", "0.004"))
    of_one = "column=bias arm=paper tokens=4096"
    assert tables.made("value", f"bias-x {of_one} part=all") == "0.00200"
    assert tables.made("value", f"bias-x {of_one} part=q") == "0.00400"
    with pytest.raises(ValueError, match="no row"):
        tables.made("value", f"bias-x {of_one} part=nonsense")


def test_runs_by_learning_rate_and_their_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head = "device,commit,name,lr,arm,seed,train_loss,val_loss,grad_norm\n"
    rows = ["H200,a,p,0.002,bf16,1,3.1,3.20,0.1\n", "H200,b,p,0.002,bf16,2,3.3,3.40,0.3\n"]
    rows += ["H200,c,p,0.002,sage_int8,2,3.3,3.41,0.2\n", "H200,a,p,1e-3,bf16,1,3.5,3.60,0.25\n"]
    rows += ["H200,c,p,0.002,another,2,3.3,3.5,0.2\n", "H200,c,p,0.002,noisy,2,3.3,3.39,0.2\n"]
    (tmp_path / "losses-x.csv").write_text(head + "".join(rows))
    said = tables.made("losses", "losses-x name=p").strip().splitlines()[2:]
    assert said == [
        "| BF16 | 0.001 | 1 | 3.5000 | 3.6000 |  | 0.250 |",
        "| BF16 | 0.002 | 1, 2 | 3.2000 ± 0.1414 | 3.3000 ± 0.1414 |  | 0.200 |",
        "| INT8 | 0.002 | 2 | 3.3000 | 3.4100 | +0.0100 | 0.200 |",
        "| BF16 with noise | 0.002 | 2 | 3.3000 | 3.3900 | -0.0100 | 0.200 |",
        "| another | 0.002 | 2 | 3.3000 | 3.5000 | +0.1000 | 0.200 |",
    ]


def test_the_probe_by_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "runs").mkdir()
    kinds = ("sigma_q", "sigma_k", "dq_error", "dk_error")
    names = [f"probe/{kind}_layer{layer}" for kind in kinds for layer in (0, 1)]
    lines = [",".join(["arm", "seed", "tokens", "probe/grad_cosine", "probe/ds_rowsum", *names])]
    lines += [
        f"sage_int8,{seed},{step}000000,{1 - step / 1e3},{step / 100},{1 + seed},{step},{step},2,.1,.2,.{3 + seed},.1"
        for seed in (0, 1)
        for step in range(1, 8)
    ]
    (tmp_path / "runs" / "probe.csv").write_text("\n".join(lines) + "\n")
    *_, first, second, third, fourth, last = tables.probe("runs").strip().splitlines()
    # Of two runs the mean, of layers the largest.
    assert first == "| 1M | 0.99900 | 0.0100 | 1.50 | 2.00 | 0.200 | 0.350 |"
    assert [line.split(" | ")[0] for line in (second, third, fourth)] == ["| 3M", "| 4M", "| 5M"]
    assert last == "| 7M | 0.99300 | 0.0700 | 7.00 | 7.00 | 0.200 | 0.350 |"
    (tmp_path / "runs" / "probe.csv").write_text("\n".join([*lines, lines[1].replace("sage_int8", "another")]) + "\n")
    with pytest.raises(ValueError, match="2 arms .*another"):
        tables.probe("runs")


def test_one_arm_above_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the seeds that both have, of the newest rows."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head = "device,commit,setting,arm,seed,train_loss,val_loss\n"
    rows = ["H200,a,s,noisy,0,3.0,3.1\n", "H200,a,s,noisy,1,3.1,3.3\n", "H200,a,s,bf16,2,3.0,3.0\n"]
    rows += ["H200,a,s,sage_int8,1,3.4,3.2\n", "H200,a,s,sage_int8,0,3.1,3.3\n", "H200,a,s,sage_int8,5,9.0,9.0\n"]
    (tmp_path / "stress-x.csv").write_text(head + "".join(rows))
    said = "stress-x setting=s arm=sage_int8 base=noisy"
    assert tables.made("apart", said) == "+0.2000 ± 0.1414"
    assert tables.made("apart", f"{said} column=val_loss") == "+0.0500 ± 0.2121"
    with pytest.raises(ValueError, match="no seed in stress-x.csv has both sage_int8 and bf16"):
        tables.made("apart", "stress-x setting=s arm=sage_int8 base=bf16")


def test_hard_settings_by_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that has not come to its end the loss has no part in the means."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    head = "device,commit,setting,steps,tokens_per_step,arm,seed,status,train_loss,worst,fails\n"
    rows = [f"H200,a,sigma10,400,16384,bf16,{seed},finished,{3 + seed / 10},0.2{seed},\n" for seed in range(3)]
    rows += ["H200,a,sigma10,400,16384,sage_int8,0,finished,3.01,0.5,\n"]
    rows += ["H200,a,sigma10,400,16384,sage_int8,1,failed,9.5,,30\n"]
    rows += ["H200,a,sigma10,400,16384,sage_int8,2,finished,3.25,4.5,120\n"]
    rows += [
        "H200,a,lr3x,400,16384,sage_int8,0,finished,3.5,0.1,\n",
        "H200,a,lr3x,400,16384,bf16,0,failed,9.5,0.3,77\n",
        "H200,a,sigma5,400,16384,sage_int8,0,finished,3.6,0.1,\n",
        "H200,a,lr3x,400,16384,a_scheme,0,finished,3.4,0.1,\n",
    ]
    (tmp_path / "stress-x.csv").write_text(head + "".join(rows))
    assert tables.made("stress", "stress-x device=H200").strip().splitlines()[2:] == [
        "| sigma10 | BF16 | 3 | 3.1000 ± 0.1000 |  | 0.2000 | 0.220 | 0 |",
        "| sigma10 | INT8 | 3 | 3.1300 ± 0.1697 | +0.0300 ± 0.0283 |  | 4.50 | 2, at step 30, 120 |",
        "| lr3x | BF16 | 1 |  |  |  | 0.300 | 1, at step 77 |",
        "| lr3x | INT8 | 1 | 3.5000 |  |  | 0.100 | 0 |",
        "| lr3x | a_scheme | 1 | 3.4000 |  |  | 0.100 | 0 |",
        "| sigma5 | INT8 | 1 | 3.6000 |  |  | 0.100 | 0 |",  # and no gap to the BF16 of another setting
    ]
    (tmp_path / "stress-x.csv").write_text(head + "".join(rows) + rows[0].replace("400", "800", 1))
    with pytest.raises(ValueError, match="sigma10 more than once: say steps=, "):
        tables.made("stress", "stress-x device=H200")
    assert "| sigma10 | BF16 | 1 |" in tables.made("stress", "stress-x device=H200 steps=800")
