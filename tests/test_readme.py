"""README's examples run as they stand, on tiny models, and its links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
README = CHECKOUT / "README.md"
PAGES = [README, CHECKOUT / "CONTRIBUTING.md", CHECKOUT / "csrc" / "README.md", *(CHECKOUT / "docs").glob("*.md")]

# What the examples get from elsewhere: a model and its tokenizer, documents, a LightningModule and its data.
GIVEN = """
import os, sys
import torch
from datasets import Dataset
from lightning.pytorch import LightningModule
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
config = LlamaConfig(vocab_size=5, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     head_dim=32, num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=0)
LlamaForCausalLM(config).save_pretrained("model")
PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained("model")

def load_dataset(*name, split):
    return Dataset.from_dict({"text": ["a b b a"] * 8})

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = LlamaForCausalLM(config)
    def training_step(self, batch, index):
        return self.model(batch, labels=batch).loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

module, datamodule = Module(), torch.utils.data.DataLoader(torch.randint(5, (2, 16)))
"""


def example(word: str, page: Path = README) -> str:
    """The example of a page that has a word in it."""
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if word in code)
    return found


def run(code: str, where: Path) -> str:
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=where, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_plain_torch(tmp_path: Path) -> None:
    said = run(example("import torch, sagetrain") + "print(q.grad.norm() > 0, k.grad.norm() > 0)", tmp_path)
    assert said.split() == ["tensor(True)"] * 2


@pytest.mark.slow
def test_clients_train_with_int8(tmp_path: Path) -> None:
    """One step of each, in one process; each is seen to call the kernel. What a CPU wants said is added."""
    hub = example("from_pretrained").replace("Qwen/Qwen2.5-0.5B", "model")
    pages = README, CHECKOUT / "docs" / "finetuning.md"
    sft, adapted = (
        re.sub("Qwen/Qwen2.5-[0-9.]+B", "model", example("SFTTrainer", page))
        .replace("from datasets import load_dataset\n", "")
        .replace(
            'SFTConfig("out", ', 'SFTConfig("out", max_length=64, max_steps=1, use_cpu=True, report_to=[], bf16=False, '
        )
        for page in pages
    )
    lightning = example("sage_ddp").replace("Trainer(", "Trainer(accelerator='cpu', fast_dev_run=1, ")
    counted = "\nfrom torch.profiler import profile\n"
    after = "print(sum('sagetrain' in e.key for e in seen.key_averages()) > 1)\n"  # forward and backward
    steps = {
        hub: "model(ids := torch.full((1, 16), 3), labels=ids).loss.backward()",
        sft: "",
        adapted: "",
        lightning: "",
    }
    code = GIVEN + counted
    for text, then in steps.items():
        body = "".join(f"    {line}\n" for line in f"{text}\n{then}".splitlines())
        code += f"with profile() as seen:\n{body}{after}"
    assert run(code, tmp_path).split().count("True") == 4


def anchors(page: Path) -> set[str]:
    """Names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(CHECKOUT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"""(?:\]\(|src=")([^)#\s"]*)(?:#([^)]*))?""", page.read_text())
    lost = []
    for where, heading in links:
        target = page.parent / where if where else page
        if "://" not in where and not (target.exists() and (not heading or heading in anchors(target))):
            lost.append(f"{where}#{heading}")
    assert not lost
