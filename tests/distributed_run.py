"""A training run of one or more processes: `torchrun … distributed_run.py FOLDER ROWS_PER_PROCESS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from echo_lora import EchoTrainer, get_echo_model
from test_trainer import ROUTED, arguments, collator, lora_config, rows, tiny_base


def main(folder: Path, batch: int) -> None:
    torch.manual_seed(5)
    model = get_echo_model(tiny_base(), lora_config(), ROUTED)
    args = arguments(folder, per_device_train_batch_size=batch, max_steps=6, save_strategy="steps", save_steps=3)
    trainer = EchoTrainer(model=model, args=args, train_dataset=rows(24), data_collator=collator)
    trainer.train()
    if trainer.is_world_process_zero():
        model.save_pretrained(folder / "adapter")
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (folder / "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
