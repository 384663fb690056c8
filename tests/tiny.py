"""The smallest model that has every part, and a run of it: overrides for tests that really train."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

MODEL = (
    "model.config.hidden_size=64",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=1",
    "model.config.num_key_value_heads=1",
)

# Two steps on the CPU, in FP32, in the arm bf16; a later override of the same key wins. ARMS: for a comparison.
RUN = (
    "recipe=quickstart",
    "compare.arms=null",
    "attention=bf16",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    *MODEL,
    "data.seq_len=32",
    "data.batch_size=2",
    "trainer.max_steps=2",
)
ARMS = (*(word for word in RUN if not word.startswith(("attention=", "compare."))), "compare.arms=[bf16,sage_int8]")

# Templates of a conversation: what Llama's and Qwen's have in common with them is where bos and line breaks stand.
TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}",
    "qwen2": "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
}
THINKS = (
    TEMPLATES["qwen2"]
    .replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
    .replace(
        "assistant\n{% endif", "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif"
    )
)
"""Of a model that thinks before an answer unless told not to, as Qwen3's."""
ALONE = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATES["qwen2"]
"""Of a model that knows no system's message, as Gemma's."""


def pretrained(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A folder as `model.path` takes it: a random model of a kind (a key of `TEMPLATES`), with tied embeddings, and a
    tokenizer of bytes with a chat template. Llama's puts bos before a text."""
    special = ["<|bos|>", "<|eos|>", "<|start|>", "<|end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if kind == "llama":
        words.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    named = {"bos_token": "<|bos|>"} if kind == "llama" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|eos|>", additional_special_tokens=special[2:], **named
    )
    tokenizer.chat_template = TEMPLATES[kind]
    tokenizer.save_pretrained(folder)
    config = AutoConfig.for_model(
        kind, vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=4096, initializer_range=0.1, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
