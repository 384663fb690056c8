"""transformers' Trainer, TRL and peft with INT8 attention: what they send along is honoured or refused.

Two measures, as in test_huggingface.py. *Masks*: the gradient of the client's first step against that of every document
run by itself through the same attention (`SAME`). *Numbers*: its error against `sdpa` is at most `RATIO` times the
error that INT8 makes on the documents by themselves.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hub
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn

from sagetrain.ops import schemes
from tests.kernelkit import RATIO, error

NAME = schemes.DEFAULT
ATTEND = hub.AttentionInterface()[NAME]
SAME = 0.05  # of the error that INT8 makes here
LENGTHS = (11, 30, 5, 17, 9, 24)
DOCUMENTS = [torch.randint(3, 61, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in LENGTHS]
MODES = {
    "packing": {"packing": True, "max_length": 48},
    "padding_free": {"padding_free": True, "max_length": None},
    "padding_free, multiple of 16": {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    "padded": {},
}


class FirstGradient(hub.TrainerCallback):
    """Keeps the gradient of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):  # noqa: ANN001, ANN003
        self.gradient = gradient(model)


def gradient(model: nn.Module) -> Tensor:
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return torch.cat(found)


def tokenizer() -> hub.PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 61)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return hub.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def build(implementation: str, lora: bool) -> nn.Module:
    torch.manual_seed(0)
    config = hub.LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                             initializer_range=0.15, pad_token_id=0)  # fmt: skip
    model = hub.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    if lora:
        options = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, options)
    return model.train()


def alone(model: nn.Module) -> Tensor:
    """Gradient of the mean over all targets, from one document at a time."""
    targets = sum(LENGTHS) - len(LENGTHS)
    for document in DOCUMENTS:
        ids = torch.tensor([document])
        (model(ids, labels=ids, use_cache=False).loss * (len(document) - 1) / targets).backward()
    return gradient(model)


def first_gradient(trainer: type, model: nn.Module, arguments: hub.TrainingArguments, **options: object) -> Tensor:
    keep = FirstGradient()
    data = Dataset.from_dict({"input_ids": DOCUMENTS})
    trainer(model, arguments, train_dataset=data, processing_class=tokenizer(), callbacks=[keep], **options).train()
    return keep.gradient


def check(lora: bool, client: Callable[[nn.Module], Tensor]) -> None:
    """`client(model)` gives the gradient of a step over all documents."""
    found = [(alone(build(name, lora)), client(build(name, lora))) for name in (NAME, "sdpa")]
    (int8, client_int8), (exact, client_exact) = found
    cost = error(int8, exact)
    assert error(client_exact, exact) <= SAME * cost, "the client trains on something else"
    assert error(client_int8, int8) <= SAME * cost
    assert 0 < error(client_int8, client_exact) <= RATIO * cost


ARGUMENTS = {
    **{"max_steps": 1, "per_device_train_batch_size": len(DOCUMENTS), "use_cpu": True, "bf16": False, "report_to": []},
    **{"save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 0},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA and checkpointing"])
@pytest.mark.parametrize("mode", MODES)
def test_sft_trainer(mode: str, lora: bool, tmp_path: Path) -> None:
    arguments = trl.SFTConfig(str(tmp_path), **ARGUMENTS, **MODES[mode], gradient_checkpointing=lora)
    check(lora, lambda model: first_gradient(trl.SFTTrainer, model, arguments))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_trainer_with_flattening(flash: bool, seq_idx: bool, tmp_path: Path) -> None:
    """Two micro-batches of three documents, each flattened into one row."""
    more = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    arguments = hub.TrainingArguments(str(tmp_path), **(ARGUMENTS | more), remove_unused_columns=False)

    def client(model: nn.Module) -> Tensor:
        options = {"return_flash_attn_kwargs": flash, "return_seq_idx": seq_idx}
        if model.config._attn_implementation == "sdpa":  # it reads position_ids only
            options = {}
        return first_gradient(hub.Trainer, model, arguments, data_collator=hub.DataCollatorWithFlattening(**options))

    check(False, client)


NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor([7, 2, 15]))[None]
ENDS = torch.tensor([0, 7, 9, 24])
PACKED = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}
IDS = torch.tensor(DOCUMENTS[5])[None]


@pytest.mark.parametrize("backend", [None, "eager"])
def test_seq_idx_has_to_agree(backend: str | None) -> None:
    model = build(NAME, False)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    torch._dynamo.reset()
    by_position = {"position_ids": torch.cat([torch.arange(n) for n in (7, 2, 15)])[None], "use_cache": False}
    with torch.no_grad():
        wanted = model(IDS, **PACKED).logits
        assert torch.equal(run(IDS, **PACKED, seq_idx=NUMBERS).logits, wanted)
        assert torch.equal(run(IDS, **PACKED, seq_idx=NUMBERS * 5 + 1).logits, wanted)
        if not backend:
            packed = model(IDS, **by_position).logits
            assert torch.equal(model(IDS, **by_position, seq_idx=NUMBERS).logits, packed)
        assert torch.equal(run(IDS, seq_idx=NUMBERS * 0, use_cache=False).logits, model(IDS, use_cache=False).logits)
        for wrong in (NUMBERS * 0, NUMBERS.roll(1), torch.arange(24)[None]):
            with pytest.raises((ValueError, RuntimeError), match="seq_idx has other documents than cu_seq_lens"):
                run(IDS, **PACKED, seq_idx=wrong)
        with pytest.raises((ValueError, RuntimeError), match="seq_idx has other documents.*pass cu_seq_lens_q"):
            run(IDS, seq_idx=NUMBERS, use_cache=False)
    with pytest.raises(NotImplementedError, match="seq_idx of shape \\(1, 23\\)"):
        model(IDS, **PACKED, seq_idx=NUMBERS[:, 1:])


def test_arguments_of_the_loss_are_not_the_attentions() -> None:
    model = build(NAME, False)
    labels = IDS.roll(-1, 1)
    wanted = nn.functional.cross_entropy(model(IDS).logits[0], labels[0], ignore_index=7, reduction="sum") / 24
    loss = model(IDS, labels=IDS, shift_labels=labels, ignore_index=7, num_items_in_batch=24).loss
    torch.testing.assert_close(loss, wanted)


SMALL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DROPPING = {
    "attn_pdrop": hub.GPT2Config(**SMALL, n_embd=64, n_layer=1, n_head=2, n_positions=64),
    "attention_dropout": hub.LlamaConfig(**SMALL, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                         num_attention_heads=2, attention_dropout=0.1),
    "attention_probs_dropout_prob": hub.BertConfig(**SMALL, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                                                   num_attention_heads=2, is_decoder=True),
    "dropout_rate": hub.T5Config(**SMALL, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("setting", DROPPING)
def test_the_advice_on_dropout_names_the_setting_of_the_model(setting: str) -> None:
    module = nn.Module()
    module.config = DROPPING[setting]
    assert getattr(module.config, setting) == 0.1
    q = torch.randn(1, 2, 8, 32)
    advice = rf"dropout \(0.1\).*set config\.{setting}=0.0.*model.config.{setting}=0.0"
    with pytest.raises(NotImplementedError, match=advice):
        ATTEND(module, q, q, q, dropout=0.1)
    with pytest.raises(NotImplementedError, match="set the attention dropout of its config to 0.0"):
        ATTEND(nn.Module(), q, q, q, dropout=0.1)


def test_gpt2_trains_once_the_advice_is_followed() -> None:
    config = copy.deepcopy(DROPPING["attn_pdrop"])
    with pytest.raises(NotImplementedError) as refusal:
        hub.AutoModelForCausalLM.from_config(config, attn_implementation=NAME).train()(IDS)
    setattr(config, re.search(r"set config\.(\w+)=0.0", str(refusal.value)).group(1), 0.0)
    model = hub.AutoModelForCausalLM.from_config(config, attn_implementation=NAME).train()
    model(IDS, labels=IDS).loss.backward()


def test_latent_attention_trains() -> None:
    """Values are narrower than keys: as `sdpa`, but for what INT8 costs a model whose heads have one width."""
    found = {}
    for width in (16, 24):
        for name in (NAME, "sdpa"):
            torch.manual_seed(0)
            config = hub.DeepseekV3Config(
                **SMALL, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=16, qk_nope_head_dim=16,
                qk_rope_head_dim=8, v_head_dim=width, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
                num_experts_per_tok=2, first_k_dense_replace=1, max_position_embeddings=64, initializer_range=0.15,
            )  # fmt: skip
            model = hub.AutoModelForCausalLM.from_config(config, attn_implementation=name).train()
            model(IDS, labels=IDS).loss.backward()
            found[width, name] = gradient(model)
    cost = error(found[24, NAME], found[24, "sdpa"])
    assert 0 < error(found[16, NAME], found[16, "sdpa"]) <= RATIO * cost
