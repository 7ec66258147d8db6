"""Runs of Axolotl and ms-swift with the plug-ins, on a tiny model and the CPU: `python plugin_runs.py PROGRAM FOLDER`.

The last line of the output is the log of the run as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ECHO = {"source_layers": [1, 2], "target_layers": [0, 1], "bottleneck": 8, "routing_end": 1.0}


def write_base(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **tokens, num_key_value_heads=2)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def axolotl(folder: Path, *settings: str) -> list[dict]:
    """settings: further settings as one JSON object."""
    import yaml
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    rows = [{"instruction": f"Count {i}.", "input": "", "output": "one two " * (i + 1)} for i in range(8)]
    data = {"path": str(write_rows(folder / "rows.jsonl", rows)), "ds_type": "json", "type": "alpaca"}
    config = {
        "base_model": str(write_base(folder)),
        "plugins": ["echo_lora.integrations.axolotl.EchoPlugin"],
        "echo": ECHO,
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "datasets": [data],
        "dataset_num_proc": 1,
        "dataset_prepared_path": str(folder / "prepared"),
        "val_set_size": 0.25,
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": False,
        "attn_implementation": "eager",
        "output_dir": str(folder / "out"),
        "special_tokens": {"pad_token": "<pad>"},
    }
    config |= json.loads(settings[0]) if settings else {}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    cfg = load_cfg(str(folder / "config.yaml"))
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    return trainer.state.log_history


def ms_swift(folder: Path, *arguments: str) -> list[dict]:
    """arguments: further arguments of `swift sft`."""
    os.environ |= {"ECHO_LORA_CONFIG": json.dumps(ECHO), "USE_HF": "1"}
    turns = [("user", "Count."), ("assistant", "one two three")]
    rows = [{"messages": [{"role": role, "content": f"{text} {i}"} for role, text in turns]} for i in range(8)]
    (folder / "plugin.py").write_text("import echo_lora.integrations.ms_swift\n")
    from swift import sft_main

    options = {
        "model": write_base(folder),
        "model_type": "llama",
        "template": "chatml",
        "dataset": write_rows(folder / "rows.jsonl", rows),
        "split_dataset_ratio": 0,
        "external_plugins": folder / "plugin.py",
        "tuner_type": "echo_lora",
        "optimizer": "echo_lora",
        "target_modules": "all-linear",
        "lora_rank": 4,
        "output_dir": folder / "out",
        "add_version": "false",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "torch_dtype": "float32",
        "attn_impl": "eager",
        "use_cpu": "true",
        "use_hf": "true",
        "check_model": "false",
        "report_to": "none",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
    }
    result = sft_main([word for name, value in options.items() for word in (f"--{name}", str(value))] + [*arguments])
    return result["log_history"]


if __name__ == "__main__":  # these programs start processes that import this file
    program, path, *more = sys.argv[1:]
    Path(path).mkdir(parents=True, exist_ok=True)
    print(json.dumps({"axolotl": axolotl, "ms_swift": ms_swift}[program](Path(path), *more)))
