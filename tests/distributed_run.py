"""One process of a training run: `distributed_run.py FOLDER SETTINGS`; see `test_distributed.launch`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset

from architectures import lora_config, tiny_echo_model
from echo_lora import EchoSFTTrainer, EchoTrainer
from echo_lora.method import grouping
from test_packing import DATA as UNEQUAL
from test_trainer import DATASETS, ROUTED, Stop, arguments, collator, rows, sft_arguments, sft_base


def prepared(args: Any) -> Any:
    """accelerate offers FSDP only to processes with a GPU each: told that these are such, it shards CPU tensors too."""
    if args.device.type == "cpu" and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState().distributed_type = DistributedType.MULTI_GPU
    return args


def make_trainer(
    folder: Path, kind: str, base: str, method: str, dtype: str, echo: str, data: list[int], **kwargs: Any
) -> EchoTrainer:
    kwargs |= {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    if kind == "EchoSFTTrainer":
        base, tokenizer = sft_base()
        base.save_pretrained(folder / f"base{os.environ.get('RANK', '')}")  # each process reads a model of its own
        columns = UNEQUAL["pairs"] if kwargs.get("packing") else DATASETS["conversational"]
        texts = Dataset.from_dict({name: column * 2 for name, column in columns.items()})
        return EchoSFTTrainer(
            model=str(folder / f"base{os.environ.get('RANK', '')}"),
            args=prepared(sft_arguments(folder, **kwargs)),
            train_dataset=texts,
            eval_dataset=texts,
            processing_class=tokenizer,
            peft_config=lora_config(method=method),
            echo_config=ROUTED,
        )
    model = tiny_echo_model(base, method=method, routing_schedule="linear", **json.loads(echo))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    args = prepared(arguments(folder, **kwargs))
    return EchoTrainer(model=model, args=args, train_dataset=rows(*data), data_collator=collator)


def main(folder: Path, settings: dict[str, Any]) -> None:
    stop, resume = settings.pop("stop"), settings.pop("resume")
    grouping.CPU_PRICE = settings.pop("price")
    trainer = make_trainer(folder, **settings)
    if stop is not None:
        trainer.add_callback(Stop(stop))
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "adapter"))
    if trainer.is_world_process_zero():
        (folder / "logs.json").write_text(json.dumps(trainer.state.log_history))
        shards = "DTensor" in {type(p.data).__name__ for p in trainer.model.parameters()}
        said = {"type": str(trainer.accelerator.distributed_type), "processes": trainer.accelerator.num_processes}
        (folder / "run.json").write_text(json.dumps(said | {"shards": shards}))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may outlive the interpreter otherwise, and abort it ("terminate called …")
