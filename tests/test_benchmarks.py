"""The benchmark of a recipe's step measures the recipe: its arms, its data, one loss for all of them."""

import csv
import itertools
import json
import lzma
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import finetune, jobs, losses, plot, pretrain
from sagetrain.__main__ import compose
from sagetrain.evaluation import scores
from sagetrain.training.train import run
from tests.tiny import MODEL, RUN


def test_a_recipes_step_arm_by_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "conditions", lambda device: {"device": device})
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(pretrain, "write", lambda rows, path: written.extend(rows))
    command = ["--device", "cpu", "--recipe", "quickstart", "--lengths", "64", "--rounds", "1", "--arms"]
    arms = ["sage_int8", "sdpa", "flex"]
    overrides = [*MODEL, "data.batch_size=2", "trainer.accumulate_grad_batches=5"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *command, *arms, "--set", *overrides])
    pretrain.main()
    assert [(row["data"], row["attention"]) for row in written] == [
        (data, arm) for data in ("packed", "plain") for arm in ("flex", "sage_int8", "sdpa")
    ]
    for refused, ours, theirs in (written[:3], written[3:]):
        assert "needs a CUDA GPU" in refused["refused"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.01) and ours["ran"] == "sage_int8"
        assert ours["step_ms"] == pytest.approx(
            ours["first_ms"] + 4 * ours["micro_ms"] + ours["optimizer_ms"], rel=1e-3
        )
        assert ours["tokens_per_s"] == pytest.approx(5 * 2 * 64 / ours["step_ms"] * 1e3, rel=1e-3)
        assert ours["x_sdpa"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"], rel=1e-2)


def test_model_flops_by_hand() -> None:
    """Two documents of 3 and 5 tokens in a row of 8: 6 N T + 6 L H_q D (9 + 25)."""
    model = pretrain.AutoModelForCausalLM.from_config(
        pretrain.model_config(pretrain.compose(["recipe=quickstart", *MODEL]).model)
    )
    count = sum(p.numel() for p in model.parameters())
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 3, 8])}
    assert pretrain.model_flops(model, batch) == 6 * count * 8 + 6 * 64 * 34
    assert pretrain.model_flops(model, {"input_ids": batch["input_ids"]}) == 6 * count * 8 + 6 * 64 * 64
    model.config.tie_word_embeddings = False
    untied = pretrain.AutoModelForCausalLM.from_config(model.config)
    assert pretrain.model_flops(untied, batch) == pretrain.model_flops(model, batch)  # what is looked up is no product


def test_a_card_with_a_lower_clock_has_a_lower_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in ("H100 80GB HBM3", 989e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("L4", None):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: f"NVIDIA {name}")
        assert pretrain.peak_flops(torch.device("cuda")) == peak


def test_kernels_are_counted_by_what_they_do() -> None:
    """By names such as a trace of a GPU has, and by the spans around them."""
    kernels = {
        "void sagetrain::sm90::forward_kernel<64>": "attention forward",
        "void sagetrain::sm90::backward_kernel<64>": "attention backward",
        "void sagetrain::sm90::prepare_kernel<64>": "quantise",
        "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64>>": "attention forward",
        "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<64>": "attention backward",
        "kernel_cutlass_kernel_flash_attn_cute_flash_fwd_sm90": "attention forward",
        "kernel_cutlass_kernel_flash_attn_cute_flash_bwd_sm90": "attention backward",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma": "attention forward",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma": "attention backward",
        "triton_tem_fused_flex_attention_2": "attention forward",
        "triton_tem_fused__to_copy_flex_attention_flex_attention_backward_zeros_3": "attention backward",
        "triton_poi_fused__to_copy_mul_silu_5": "other",
        "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "products",
        "Memcpy DtoD (Device -> Device)": "copies",
    }
    for name, kind in kernels.items():
        assert pretrain.by_kind([{"cat": "kernel", "name": name, "ts": 5, "dur": 2000}]) == {kind: 2.0}, name
    spans = [
        {"cat": "gpu_user_annotation", "name": name, "ts": start, "dur": 100}
        for name, start in (("loss", 0), ("Optimizer.step#AdamW8bit.step", 100), ("## Call CompiledFxGraph ##", 200))
    ]
    work = [{"cat": "kernel", "name": "nvjet_tst", "ts": start, "dur": 1000} for start in (0, 99, 100, 200, 250)]
    host = [{"cat": "user_annotation", "name": "loss", "ts": 200, "dur": 100}, {"name": "no category", "ts": 0}]
    assert pretrain.by_kind(spans + work + host) == {"loss": 2.0, "optimizer": 1.0, "products": 2.0}


def test_a_peer_that_is_called_directly_is_known() -> None:
    cfg = pretrain.compose(["recipe=quickstart", *MODEL, "compare.arms=null", "data.seq_len=64"])
    cfg.trainer.precision = "bf16-mixed"
    device = torch.device("cpu")
    model, optimizer = pretrain.build(cfg, device)
    pair = [{"input_ids": torch.arange(64)[None], "labels": torch.arange(64)[None]}] * 2
    arm = pretrain.Arm("sdpa_flash", pretrain.peer("sdpa_flash"), model, optimizer, cfg.trainer.precision)
    arm.warm_up(pair)
    assert (arm.found["ran"], arm.found["handicap"]) == ("SDPA FlashAttention-2", None)
    assert "nobody watched" in pretrain.ran("eager")[1]


def packed(*lengths: int) -> dict[str, Any]:
    """A micro-batch of documents of these lengths."""
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {
        "input_ids": places,
        "labels": places,
        "position_ids": places,
        "cu_seq_lens_q": cu,
        "cu_seq_lens_k": cu,
    } | longest


@pytest.mark.usefixtures("uncompiled")
def test_layers_run_whole_beside_gradients_of_another_type() -> None:
    """As memory=24gb has them: the second micro-batch, which compiles anew, finds FP32 gradients of BF16 weights."""
    options = ["model.compile=true", "model.checkpointing=full", "compare.arms=null"]
    torch.compiler.reset()
    device = torch.device("cpu")
    model, optimizer = pretrain.build(pretrain.compose(["recipe=quickstart", *MODEL, *options]), device)
    model.to(torch.bfloat16)
    for weight in model.parameters():
        weight.grad_dtype = torch.float32
    arm = pretrain.Arm(
        "sage_int8", pretrain.implementation("sage_int8", "packed", device), model, optimizer, "bf16-true"
    )
    arm.warm_up([packed(24, 40), packed(4, 20, 40)])
    assert arm.found["graph_breaks"] == 0


@pytest.mark.parametrize("order", [("sdpa", "sage_int8"), ("sage_int8", "sdpa")])
def test_an_attention_that_breaks_its_layers_breaks_no_other(
    order: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU `sdpa` goes through packed documents one by one, in no graph."""
    graphs_run: list[None] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        return lambda *args: (graphs_run.append(None), graph(*args))[1]

    monkeypatch.setattr(torch._dynamo, "lookup_backend", {"inductor": backend}.get)
    layers = "model.config.num_hidden_layers=2"
    cfg = pretrain.compose(["recipe=quickstart", *MODEL, layers, "model.compile=true", "compare.arms=null"])
    device = torch.device("cpu")
    torch.compiler.reset()
    model, optimizer = pretrain.build(cfg, device)
    pair = [packed(24, 40)] * 2
    arms = [
        pretrain.Arm(name, pretrain.implementation(name, "packed", device), model, optimizer, "32-true")
        for name in order
    ]
    for arm in arms:
        arm.warm_up(pair)
    breaks, graphs = {}, {}
    for arm in arms * 2:
        graphs_run.clear()
        list(arm.step(pair[:1] * 2))
        breaks[arm.name], graphs[arm.name] = arm.found["graph_breaks"], len(graphs_run)
    assert breaks["sage_int8"] == 0 and graphs["sage_int8"] == 2 * 2
    assert breaks["sdpa"] > 0 and graphs["sdpa"] > 2 * 2


def test_runs_of_fine_tuning_are_not_repeated_and_give_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Commands that only write what the real ones write."""
    data, said = tmp_path / "data", []
    data.mkdir()
    with lzma.open(data / "drop-dev.jsonl.xz", "wt") as file:
        file.writelines(f'{{"passage": "{i % 50}", "question": "{i}"}}\n' for i in range(500))

    def command(words: list[str], env: dict[str, str], **_: Any) -> SimpleNamespace:
        said.append((env["CUDA_VISIBLE_DEVICES"], words[2:]))
        if words[2] == "sagetrain":
            given = dict(word.split("=", 1) for word in words[3:])
            out, arm, step = Path(given["out"]), given["attention"], 3
            out.mkdir()
            facts = {
                "recipe": "drop_finetune",
                "arm": arm,
                "seed": int(given["seed"]),
                "status": "finished",
                "steps": 3,
            }
            (out / "run.json").write_text(json.dumps(facts))
            (out / "metrics.csv").write_text("step,loss,val_loss\n1,3,\n2,2,2.5\n3,1,1.5\n")
        else:
            given = dict(zip(words[4::2], words[5::2], strict=False))
            out, arm, step = Path(given["--out"]), given["--attention"], 3 * ("before" not in given["--out"])
        score = {"scores": {"em": 0.25 if arm == "sdpa" else 0.5, "f1": 0.75}, "n": 7}
        scores.keep(out, step, arm, {"drop": score})
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(jobs.subprocess, "run", command)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(finetune, "conditions", lambda device: {"device": device})
    monkeypatch.setattr(finetune, "kernel_file", lambda name, device: tmp_path / "results" / f"{name}-cpu.csv")
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(finetune, "write", lambda rows, path: written.extend(rows))
    words = ["--model", str(tmp_path), "--data", str(data), "--out", str(tmp_path / "out"), "--tasks", "drop"]
    words += ["--seeds", "2", "data.batch_size=1"]
    finetune.main(words)
    assert len(said) == 2 * (2 * 2 + 1) and {gpu for gpu, _ in said} <= {"2", "3"}
    runs = [words for _, (kind, *words) in said if kind == "sagetrain"]
    assert all(words.count("data.batch_size=1") == 1 and "data.batch_size=32" not in words for words in runs)
    assert all("eval.batch_size=512" in words for words in runs)
    assert len(written) == 2 * 2 * 2
    row = next(row for row in written if row["arm"] == "sage_int8" and row["metric"] == "em")
    assert (row["before"], row["after"], row["other"], row["val_loss"], row["train_loss"]) == (0.5, 0.5, 0.25, 1.5, 1)
    drawn = list(csv.DictReader((tmp_path / "results" / f"{tmp_path.name.lower()}-drop-cpu" / "metrics.csv").open()))
    assert [(row["arm"], row["seed"], row["loss"]) for row in drawn[:7:3]] == [
        ("bf16", "0", "3"), ("bf16", "1", "3"), ("sage_int8", "0", "3")]  # fmt: skip
    finetune.main(words)
    assert len(said) == 10  # nothing was run again
    with monkeypatch.context() as later:
        later.setattr(finetune, "conditions", lambda device: {"device": device, "commit": "another"})
        with pytest.raises(ValueError, match="has runs of commit None: choose another folder"):
            finetune.main(words)
    for others in ([*words[:-1], "data.batch_size=2"], [*words, "--limit", "5"], ["--model", "/other", *words[2:]]):
        with pytest.raises(ValueError, match="has runs of .*: choose another folder"):
            finetune.main(others)
    shutil.rmtree(tmp_path / "out" / "drop" / "before-bf16")
    monkeypatch.setattr(jobs.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    with pytest.raises(RuntimeError, match=r"sagetrain.evaluate ended with status 2: .*before.txt has what it said"):
        finetune.main(words)
    written.clear()
    scores.keep(tmp_path / "out" / "drop" / "before-bf16", 0, "bf16", {"drop": {"scores": {"em": 0, "f1": 0}, "n": 7}})
    with pytest.raises(RuntimeError, match="ended with status 2"):
        finetune.main([*words[:7], "drop", "gsm8k", *words[8:]])
    assert {row["task"] for row in written} == {"drop"}  # which was done before gsm8k failed
    train, asked = (
        {json.loads(line)["passage"] for line in (tmp_path / "out" / "drop" / f"drop-{part}.jsonl").open()}
        for part in ("train", "eval")
    )
    assert len(train | asked) == 50 and not train & asked and 3 < len(asked) < 20


@pytest.mark.parametrize(
    ("arms", "named", "colours", "below"),
    [
        (["bf16", "sage_int8"], ["BF16", "SageTrain INT8"], ["sage_int8"], "INT8 − BF16, same seed"),
        (
            ["published", "bf16", "noisy"], ["BF16", "published scheme", "BF16 with noise"], ["published", "noisy"],
            "difference to\nBF16",
        ),
        (
            ["bf16", "flex", "noisy", "fa4", "sage_int8", "published"],
            [
                "BF16", "BF16 by FlexAttention", "BF16 with noise", "BF16 by FlashAttention-4", "SageTrain INT8",
                "published scheme",
            ],
            ["flex", "noisy", "fa4", "sage_int8", "published"], "difference to\nBF16",
        ),
        (
            [f"bf16 optim.lr={lr}" for lr in range(4)], [f"BF16, optim.lr={lr}" for lr in range(4)],
            ["sage_int8", "noisy", "published"], "difference to\noptim.lr=0",
        ),
        (
            ["bf16 x=1, y=2", "sage_int8 x=1"], ["BF16, x=1, y=2", "SageTrain INT8, x=1"], ["sage_int8"],
            "INT8 − BF16, same seed",
        ),
        (
            ["bf16", "sage_int8 x=1", "sage_int8 x=2"], ["BF16", "SageTrain INT8, x=1", "SageTrain INT8, x=2"],
            ["sage_int8", "noisy"], "difference to\nBF16",
        ),
        (
            ["bf16 x=1", "bf16 x=2", "sage_int8 x=1"], ["BF16, x=1", "BF16, x=2", "SageTrain INT8, x=1"],
            ["noisy", "sage_int8"], "difference to\nx=1",
        ),
    ],
)  # fmt: skip
def test_curves_of_arms_beside_the_first(
    arms: list[str], named: list[str], colours: list[str], below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them by its own colour, and by its distance to BF16 (else to the first) of the same seed, which is 3 or 6
    where seeds are 1 apart, and 50 more at the first step."""
    drawn: list[Any] = []
    monkeypatch.setattr(plot, "save", lambda figure, target: drawn.append(figure))
    rows = [
        f'"{arm}",{seed},{10 + 3 * i * (seed + 1) + seed + 50 * i * (step == 0)}'
        for i, arm in enumerate(arms) for seed in (0, 1) for step in range(20)
    ]  # fmt: skip
    (tmp_path / "metrics.csv").write_text("\n".join(["arm,seed,loss", *rows]) + "\n")
    plot.loss(tmp_path)
    upper, lower = drawn[0].axes
    assert [text.get_text() for text in upper.get_legend().get_texts()] == named
    assert [line.get_color() for line in lower.lines] == [plot.OF_ARMS[name] for name in colours for _ in (0, 1)]
    base = next((i for i, arm in enumerate(arms) if arm == "bf16"), 0)
    apart = [3 * (i - base) * (seed + 1) for i in range(len(arms)) if i != base for seed in (0, 1)]
    assert [line.get_ydata()[-1] for line in lower.lines] == apart
    low, high = lower.get_ylim()
    assert all(low < value < high for line in lower.lines for value in line.get_ydata())
    said = [text.get_text() for text in lower.get_legend().get_texts()]
    assert said[0].endswith("seed to seed") and [*said[1:], lower.get_ylabel()][0] == below


def test_a_mean_is_over_the_seeds_that_all_arms_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plot, "save", lambda figure, target: drawn.append(figure))
    (tmp_path / "metrics.csv").write_text("arm,seed,loss\nbf16,0,10\nbf16,1,12\nnoisy,1,13\n")
    plot.loss(tmp_path)
    upper, lower = drawn[0].axes
    assert [line.get_ydata()[-1] for line in upper.lines if line.get_linewidth() == 2] == [12, 13]
    assert [line.get_ydata()[-1] for line in lower.lines] == [1]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (["bf16,0"], "two to 6 are drawn"),
        (["bf16,0", *(f"{arm},0" for arm in "abcdef")], "two to 6 are drawn"),
        (["bf16,0", "noisy,0", "noisy,1"], "noisy seed 1, and no bf16 of that seed"),
        (["bf16,0", "noisy,0", "noisy,0"], "runs of 1, 2 steps"),
        (["bf16,0", "bf16,1", "noisy,0", "published,1"], "no seed of all of bf16, noisy, published"),
    ],
)
def test_what_cannot_be_drawn(rows: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("\n".join(["arm,seed,loss", *(f"{row},1" for row in rows)]) + "\n")
    with pytest.raises(SystemExit, match=said):
        plot.loss(tmp_path)


def test_rows_of_something_else_are_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "losses.csv").write_text("device,arm\nH200,bf16\n")
    with pytest.raises(SystemExit, match="has no rows of benchmarks.attention"):
        plot.attention(tmp_path / "losses.csv")


def test_a_row_stands_for_the_same_run_alone() -> None:
    """Columns that it lacks, or that were added since and are empty in it, say nothing."""
    row = {"date": "now", "commit": "b", "name": "x", "arm": "bf16", "seed": 1, "model_type": None, "train_loss": "1.5"}
    before = {"date": "then", "commit": "a", "name": "x", "arm": "bf16", "seed": "1", "model_type": ""}
    before["train_loss"] = "1.5"
    assert losses.kept(row | {"new": 2}, [before]) is before
    assert losses.kept(row | {"new": 2}, [before | {"new": ""}])["commit"] == "a"
    for other in ({"name": "y"}, {"arm": "noisy"}, {"seed": 2}, {"train_loss": "1.6"}):
        assert losses.kept(row | other, [before])["commit"] == "b"


def test_losses_of_runs_give_rows_and_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(losses, "RESULTS", tmp_path / "results")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} and {i} is {i + i}. " * 5}) + "\n" for i in range(300)))
    short = ["trainer.max_steps=12", "probe.every=4", "attention=sage_int8", f"data.path={text}"]
    short += ["data.val_documents=20", "trainer.val_check_interval=6", "trainer.limit_val_batches=2"]
    for lr in ("1e-3", "2e-3"):
        run(compose([*RUN, *short, "seed=3", f"optim.lr={lr}", f"out={tmp_path / 'runs' / lr}"]))
    monkeypatch.setattr(losses, "conditions", lambda device: {"date": "today", "kernel": "cpu/x", "commit": "here"})
    losses.main(["tiny", str(tmp_path / "runs"), "--commit", "abc"])

    rows = list(csv.DictReader((tmp_path / "results" / "losses-cpu-x.csv").open()))
    assert [(row["name"], row["lr"], row["seed"], row["steps"]) for row in rows] == [
        ("tiny", "0.001", "3", "12"), ("tiny", "0.002", "3", "12"),
    ]  # fmt: skip
    assert {row["commit"] for row in rows} == {"abc"} and rows[0]["arm"] == "sage_int8" and rows[0]["device"]
    losses.main(["tiny", str(tmp_path / "runs"), "--commit", "later"])  # their rows stand as they are
    assert list(csv.DictReader((tmp_path / "results" / "losses-cpu-x.csv").open())) == rows
    assert "2 of 2 rows stand as they were, of commit abc" in capsys.readouterr().out
    assert b"\r" not in (tmp_path / "results" / "losses-cpu-x.csv").read_bytes()
    curves = list(csv.DictReader((tmp_path / "results" / "tiny-cpu-x" / "metrics.csv").open()))
    assert len(curves) == 24 and "probe/ds_rowsum" in curves[0] and not any("_layer" in column for column in curves[0])
    probes = list(csv.DictReader((tmp_path / "results" / "tiny-cpu-x" / "probe.csv").open()))
    assert [row["step"] for row in probes] == ["4", "8", "12"] * 2 and "loss" not in probes[0]
    assert all(row["probe/ds_rowsum"] and row["probe/dq_error_layer0"] for row in probes)
    run(compose([*RUN, *short, "probe.every=0", "seed=3", "optim.lr=2e-3", f"out={tmp_path / 'bare'}"]))
    losses.main(["tiny", str(tmp_path / "bare")])
    again = list(csv.DictReader((tmp_path / "results" / "losses-cpu-x.csv").open()))  # another run of that rate
    assert [(row["lr"], row["commit"]) for row in again] == [("0.001", "abc"), ("0.002", "here")]
    assert not (tmp_path / "results" / "tiny-cpu-x" / "probe.csv").exists()
    found = (tmp_path / "results" / "tiny-cpu-x" / "comparison.json").read_text()
    assert json.loads(found)["common_step"] == 12 and str(tmp_path) not in found
    for row, curve in zip(rows, (curves[:12], curves[12:]), strict=True):
        validated = [float(step["val_loss"]) for step in curve if step["val_loss"]]
        trained = [float(step["loss"]) for step in curve]
        assert row["train_loss"] == f"{sum(trained[-5:]) / 5:.5f}" and row["val_loss"] == f"{validated[-1]:.5f}"
        assert row["tokens"] == curve[-1]["tokens"]

    facts = tmp_path / "runs" / "1e-3" / "run.json"
    facts.write_text(facts.read_text().replace('"finished"', '"stopped"'))
    with pytest.raises(ValueError, match="1e-3 has not finished: its status is stopped"):
        losses.main(["tiny", str(tmp_path / "runs")])
