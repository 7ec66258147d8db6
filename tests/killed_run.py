"""A training run to be killed: `python killed_run.py FOLDER [resume]`. Prints each step it ends."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from echo_lora import EchoTrainer, get_echo_model
from test_trainer import ROUTED, arguments, collator, lora_config, rows, tiny_base

STEPS = 24


class Say(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(f"step {state.global_step}", flush=True)


def main(folder: Path, *, resume: bool) -> None:
    torch.manual_seed(5)
    model = get_echo_model(tiny_base(), lora_config(lora_dropout=0.1), ROUTED)
    args = arguments(folder, max_steps=STEPS, save_strategy="steps", save_steps=1, save_total_limit=1)
    trainer = EchoTrainer(model=model, args=args, train_dataset=rows(), data_collator=collator, callbacks=[Say()])
    trainer.train(resume_from_checkpoint=resume)
    model.save_pretrained(folder / "adapter")


if __name__ == "__main__":
    main(Path(sys.argv[1]), resume=sys.argv[2:] == ["resume"])
