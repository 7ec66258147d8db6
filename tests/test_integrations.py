"""The plug-ins for Axolotl and ms-swift.

`slow` tests run the real programs where they are installed (Axolotl 0.19 and ms-swift 4.6 with the versions they pin).
The others run against doubles: modules with the names and signatures that the plug-ins use.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from architectures import lora_config, tiny_base
from echo_lora import EchoConfig, EchoModel, EchoTrainer, attach_echo
from echo_lora.errors import EchoConfigError
from tiny import tiny_tokenizer

PLUGIN = "echo_lora.integrations.axolotl.EchoPlugin"
ECHO = {"source_layers": [1, 2], "target_layers": [0, 1], "bottleneck": 8}
ROWS = [{"input_ids": [1, 5, 6, 7 + i, 8, 9], "labels": [-100, -100, -100, 7 + i, 8, 9]} for i in range(6)]


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    defaults = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 4, "save_steps": 2}
    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return TrainingArguments(str(folder), **fixed | defaults | kwargs)


def adapted() -> PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(tiny_base(), lora_config())


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def double(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Put modules with these names and contents where imports find them."""
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name.startswith("echo_lora.integrations.")]:
        monkeypatch.delitem(sys.modules, name)


# ------------------------------------------------------------------------------------------------------------ Axolotl


class BasePlugin:
    """Axolotl's class: every hook exists and does nothing."""

    def register(self, cfg): ...
    def get_input_args(self): ...
    def get_training_args_mixin(self): ...
    def get_training_args(self, cfg): ...
    def get_trainer_cls(self, cfg): ...
    def post_trainer_create(self, cfg, trainer): ...


class AxolotlTrainer(Trainer):
    """Axolotl's arguments beside Trainer's."""

    def __init__(self, *args, bench_data_collator=None, eval_data_collator=None, dataset_tags=None, **kwargs):
        self.bench_data_collator, self.eval_data_collator = bench_data_collator, eval_data_collator
        super().__init__(*args, **kwargs)


@pytest.fixture
def axolotl(monkeypatch):
    double(
        monkeypatch,
        {
            "axolotl": {},
            "axolotl.integrations": {},
            "axolotl.integrations.base": {"BasePlugin": BasePlugin},
            "axolotl.core": {},
            "axolotl.core.trainers": {"AxolotlTrainer": AxolotlTrainer},
        },
    )
    return importlib.import_module("echo_lora.integrations.axolotl")


def test_axolotls_trainer_trains_its_adapter_as_echo_trainer_does(axolotl, tmp_path):
    plugin = axolotl.EchoPlugin()
    cfg = {"plugins": [PLUGIN], "echo": ECHO}
    args = arguments(tmp_path / "axolotl")
    args.echo = plugin.get_training_args(cfg)["echo"]
    model = adapted()
    set_seed(4)
    trainer = plugin.get_trainer_cls(cfg)(
        model=model,
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=None,
        args=args,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        eval_data_collator=None,
        bench_data_collator=None,
        dataset_tags=[],
        callbacks=[],
        processing_class=tiny_tokenizer(),
    )
    plugin.post_trainer_create(cfg, trainer)
    trainer.train()
    assert any("ce_on" in entry for entry in trainer.state.log_history)
    model.save_pretrained(tmp_path / "saved")  # Axolotl saves the model that it made

    reference = adapted()
    set_seed(4)
    theirs = EchoTrainer(
        model=attach_echo(reference, EchoConfig(**ECHO)),
        train_dataset=Dataset.from_list(ROWS),
        args=arguments(tmp_path / "reference"),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tiny_tokenizer(),
    )
    theirs.train()
    theirs.model.save_pretrained(tmp_path / "theirs")
    ours, expected = adapter_of(tmp_path / "saved"), adapter_of(tmp_path / "theirs")
    assert ours.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.items())


def test_axolotls_kernels_and_reentrant_checkpointing_are_off_unless_they_are_set(axolotl):
    plugin = axolotl.EchoPlugin()
    cfg = {"plugins": [PLUGIN], "lora_o_kernel": True, "gradient_checkpointing": True}
    plugin.register(cfg)
    assert (cfg["lora_mlp_kernel"], cfg["lora_qkv_kernel"], cfg["lora_o_kernel"]) == (False, False, True)
    assert cfg["gradient_checkpointing_kwargs"] == {"use_reentrant": False}


def test_axolotls_plug_in_does_nothing_in_a_configuration_without_it(axolotl):
    """Axolotl keeps the plug-ins of earlier configurations in the process."""
    plugin, cfg = axolotl.EchoPlugin(), {"plugins": ["other.Plugin"], "gradient_checkpointing": True}
    plugin.register(cfg)
    assert cfg == {"plugins": ["other.Plugin"], "gradient_checkpointing": True}
    assert plugin.get_trainer_cls(cfg) is None
    assert plugin.get_training_args(cfg) is None
    plugin.post_trainer_create(cfg, object())


def test_another_plug_ins_trainer_is_refused(axolotl, tmp_path):
    trainer = AxolotlTrainer(model=adapted(), args=arguments(tmp_path))
    with pytest.raises(EchoConfigError, match="the trainer is AxolotlTrainer, from another plug-in"):
        axolotl.EchoPlugin().post_trainer_create({"plugins": [PLUGIN]}, trainer)


def merged(axolotl) -> type[BaseModel]:
    """Axolotl mixes the plug-in's class into its own configuration class, as here."""

    class Configuration(BaseModel):
        model_config = {"extra": "allow"}
        adapter: str | None = None

    return type(
        "Merged", (Configuration, getattr(axolotl, axolotl.EchoPlugin().get_input_args().rpartition(".")[2])), {}
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter": None}, "adapter: None can't carry the echo. Set adapter: lora, or qlora"),
        ({"sample_packing": True}, "sample_packing: True can't be combined with the echo: each row needs its own"),
        ({"train_on_inputs": True}, "no token says where the answer begins"),
        ({"lora_mlp_kernel": True}, "lora_mlp_kernel: True .*fused kernels read the adapter's weights"),
        ({"lora_qkv_kernel": True}, "lora_qkv_kernel"),
        ({"rl": "dpo"}, "rl: dpo .* supervised fine-tuning"),
        ({"liger_fused_linear_cross_entropy": True}, "computes its own losses"),
        ({"trainer_cls": "a.B"}, "trainer_cls: a.B"),
        ({"context_parallel_size": 2}, "context_parallel_size: 2 .*Set it to 1"),
        ({"gradient_checkpointing": "offload"}, "gradient_checkpointing: offload .*Set it to true"),
        ({"echo": {"target_layer": [1]}}, "unknown field 'target_layer'.*Did you mean 'target_layers'"),
        ({"echo": {"bottleneck": 0}}, "bottleneck = 0 must be at least 1"),
    ],
)
def test_axolotls_configuration_refuses(axolotl, settings, words):
    Configuration = merged(axolotl)
    assert Configuration(adapter="lora", echo=ECHO).echo == ECHO
    with pytest.raises(ValidationError, match=words):
        Configuration(**{"adapter": "lora", "echo": ECHO} | settings)


def test_the_configuration_of_the_docs_is_accepted(axolotl):
    text = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
    cfg = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert cfg["plugins"] == [PLUGIN]
    axolotl.EchoPlugin().register(cfg)
    assert merged(axolotl)(**cfg).echo == cfg["echo"]


# ----------------------------------------------------------------------------------------------------------- ms-swift


class OptimizerCallback:
    """ms-swift's: it makes the optimizer for the trainer."""

    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model=None):
        return Trainer.create_optimizer(self.trainer)


class PeftTuner:
    """ms-swift's base class of tuners."""


class SwiftTrainer(Trainer):
    """What ms-swift's trainer does with an optimizer of a plug-in, and with the loss."""

    def __init__(self, model, args, template, optimizers_map, optimizer="echo_lora", **kwargs):
        self.template = template
        self.optimizer_callback = optimizers_map[optimizer](args, self)
        super().__init__(model=model, args=args, **kwargs)

    def create_optimizer(self, model=None):
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        labels = inputs["labels"]
        outputs.loss = outputs.loss * ((labels[:, 1:] != -100).sum() / num_items_in_batch)
        assert outputs.logits is None or not self.model.training
        return (outputs.loss, outputs) if return_outputs else outputs.loss


@pytest.fixture
def swift(monkeypatch):
    maps = SimpleNamespace(tuners={}, optimizers={"default": OptimizerCallback})

    def prepare_adapter(args, model):
        assert args.tuner_type == "lora"
        torch.manual_seed(1)
        return peft.get_peft_model(model, lora_config(r=args.lora_rank))

    double(
        monkeypatch,
        {
            "swift": {},
            "swift.optimizers": {"OptimizerCallback": OptimizerCallback, "optimizers_map": maps.optimizers},
            "swift.pipelines": {},
            "swift.pipelines.train": {},
            "swift.pipelines.train.tuner": {"prepare_adapter": prepare_adapter},
            "swift.tuner_plugin": {"PeftTuner": PeftTuner, "tuners_map": maps.tuners},
        },
    )
    monkeypatch.setenv("ECHO_LORA_CONFIG", json.dumps(ECHO))
    maps.module = importlib.import_module("echo_lora.integrations.ms_swift")
    maps.tuner = maps.tuners["echo_lora"]
    return maps


TEMPLATE = SimpleNamespace(packing=False, padding_free=False, sequence_parallel_size=1, loss_scale=SimpleNamespace())


def swift_args(**kwargs: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"tuner_type": "echo_lora", "tuner_backend": "peft", "init_weights": True, "lora_rank": 4} | kwargs
    )


def swift_trainer(swift, folder: Path, model: Any, *, optimizer: str = "echo_lora", **kwargs: Any) -> SwiftTrainer:
    return SwiftTrainer(
        model,
        arguments(folder, **kwargs),
        TEMPLATE,
        swift.optimizers,
        optimizer,
        train_dataset=Dataset.from_list(ROWS),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    )


def test_ms_swifts_tuner_and_optimizer_train_as_echo_trainer_does(swift, tmp_path):
    args = swift_args()
    model = swift.tuner.prepare_model(args, tiny_base())
    assert isinstance(model, EchoModel)
    assert model.echo_config == EchoConfig(**ECHO)
    assert args.tuner_type == "echo_lora"
    set_seed(4)
    trainer = swift_trainer(swift, tmp_path / "swift", model)
    trainer.train()
    assert trainer.args.use_logits_to_keep is False
    rates = {bool(group.get("echo")): group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {False: 1e-2, True: 1e-1}

    base = tiny_base()
    torch.manual_seed(1)  # as the double does
    reference = attach_echo(peft.get_peft_model(base, lora_config()), EchoConfig(**ECHO))
    set_seed(4)
    theirs = EchoTrainer(
        model=reference,
        args=arguments(tmp_path / "reference"),
        train_dataset=Dataset.from_list(ROWS),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
    )
    theirs.train()
    expected = theirs.model.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    checkpoint = tmp_path / "swift" / "checkpoint-2"
    assert (checkpoint / "echo_state.safetensors").is_file()
    assert not any("echo" in name for name in adapter_of(checkpoint))


def test_ms_swift_resumes_into_another_folder_as_if_it_had_not_stopped(swift, tmp_path):
    torch.manual_seed(1)
    whole = swift_trainer(swift, tmp_path / "first", swift.tuner.prepare_model(swift_args(), tiny_base()))
    whole.train()
    checkpoint = tmp_path / "first" / "checkpoint-2"
    model = swift.tuner.from_pretrained(tiny_base(), str(checkpoint), is_trainable=True)
    again = swift_trainer(swift, tmp_path / "second", model, resume_from_checkpoint=str(checkpoint))
    again.train(str(checkpoint))
    expected = whole.model.state_dict()
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7, msg=name)


def test_ms_swift_loads_a_plain_model_for_inference(swift, tmp_path):
    adapted().save_pretrained(tmp_path)
    assert type(swift.tuner.from_pretrained(tiny_base(), str(tmp_path))) is not EchoModel


def test_ms_swifts_tuner_without_its_optimizer_refuses_to_train(swift, tmp_path):
    model = swift.tuner.prepare_model(swift_args(), tiny_base())
    with pytest.raises(EchoConfigError, match="--tuner_type echo_lora needs --optimizer echo_lora"):
        swift_trainer(swift, tmp_path, model, optimizer="default").train()
    assert torch.isfinite(model.eval()(input_ids=torch.tensor([[5, 6]])).logits).all()


def test_ms_swifts_optimizer_without_its_tuner_refuses(swift, tmp_path):
    with pytest.raises(EchoConfigError, match="Pass --tuner_type echo_lora too"):
        swift_trainer(swift, tmp_path, adapted()).train()


@pytest.mark.parametrize(
    ("args", "template", "words"),
    [
        ({}, {"packing": True}, "--packing true"),
        ({}, {"padding_free": True}, "--padding_free true"),
        ({}, {"sequence_parallel_size": 2}, "--sequence_parallel_size 2"),
        ({}, {"loss_scale": SimpleNamespace(is_binary=False)}, "--loss_scale with weights"),
        ({"enable_dft_loss": True}, {}, "--enable_dft_loss True .*own losses"),
        ({"use_logits_to_keep": True}, {}, "--use_logits_to_keep True"),
        ({"use_liger_kernel": True}, {}, "use_liger_kernel=True can't be combined"),
        ({"loss_type": "cross_entropy"}, {}, "loss_type='cross_entropy'"),
    ],
)
def test_ms_swifts_optimizer_refuses(swift, args, template, words):
    swift.module.refuse_training(SimpleNamespace(loss_type=None), TEMPLATE)
    with pytest.raises(EchoConfigError, match=words):
        swift.module.refuse_training(SimpleNamespace(**args), SimpleNamespace(**vars(TEMPLATE) | template))


@pytest.mark.parametrize("given", [{"tuner_backend": "unsloth"}, {"init_weights": "lora-ga"}])
def test_ms_swifts_tuner_refuses(swift, given):
    with pytest.raises(EchoConfigError, match="Use --tuner_backend peft, and another initialisation than lora-ga"):
        swift.tuner.prepare_model(swift_args(**given), tiny_base())


def test_the_variable_holds_json_or_the_name_of_a_file(swift, monkeypatch, tmp_path):
    file = tmp_path / "echo.json"
    file.write_text(EchoConfig(**ECHO).to_json())
    monkeypatch.setenv("ECHO_LORA_CONFIG", str(file))
    assert swift.module.echo_config() == EchoConfig(**ECHO)
    monkeypatch.delenv("ECHO_LORA_CONFIG")
    assert swift.module.echo_config() == EchoConfig()
    for text, words in {
        "nowhere.json": "neither JSON nor a file",
        '{"bottelneck": 8}': "Did you mean 'bottleneck'",
    }.items():
        monkeypatch.setenv("ECHO_LORA_CONFIG", text)
        with pytest.raises(EchoConfigError, match=f"ECHO_LORA_CONFIG.*{words}"):
            swift.module.echo_config()


# -------------------------------------------------------------------------------------------------- the real programs


def run(program: str, folder: Path, *args: str) -> str:
    """The output of a program of this folder's `plugin_runs.py`."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1"}
    command = [sys.executable, str(Path(__file__).with_name("plugin_runs.py")), program, str(folder), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def assert_trained(folder: Path) -> None:
    """A plain adapter whose lora_B has left zero everywhere."""
    tensors = adapter_of(folder)
    assert all("lora_" in name for name in tensors)
    assert all(value.any() for name, value in tensors.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("axolotl") is None, reason="axolotl is not installed")
def test_axolotl_itself_trains_with_the_plug_in(tmp_path):
    log = json.loads(run("axolotl", tmp_path).splitlines()[-1])
    assert any(entry.get("ce_on", 0) > 0 and entry.get("distillation", 0) > 0 for entry in log)
    assert any("eval_ce_on" in entry for entry in log)
    assert_trained(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("swift") is None, reason="ms-swift is not installed")
def test_ms_swift_itself_trains_with_the_plug_in(tmp_path):
    log = json.loads(run("ms_swift", tmp_path).splitlines()[-1])
    assert log[-1]["step"] == 4
    assert_trained(tmp_path / "out" / "checkpoint-4")
    assert (tmp_path / "out" / "checkpoint-4" / "echo_state.safetensors").is_file()
