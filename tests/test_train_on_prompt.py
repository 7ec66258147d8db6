"""`data.train_on_prompt`: from rows to a trained adapter, in recipes and in scripts."""

from __future__ import annotations

import dataclasses
import json

import peft
import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from architectures import Row, collate, lora_config, random_row, tiny_base
from echo_lora import EchoCallback, EchoConfig, EchoSFTTrainer, EchoTrainer, get_echo_model
from echo_lora.data.check import SpecialTokens, check_tokenized_dataset
from echo_lora.data.prepared import prepare_rows
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoDataError
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.plan import plan
from echo_lora.recipe.prepare import preview
from echo_lora.recipe.train import run
from echo_lora.training.collator import RowCollator
from test_trainer import DATASETS, ROUTED, adapter_of, arguments, collator, sft_arguments, sft_trainer
from tiny import tiny_tokenizer
from tiny_recipe import ROWS, tiny_recipe


def some_rows(count: int = 16, seed: int = 0) -> list[Row]:
    g = torch.Generator().manual_seed(seed)
    return [random_row(g, *(int(torch.randint(1, 7, (), generator=g)) for _ in range(2))) for _ in range(count)]


def whole_text(rows: list[Row]) -> Dataset:
    """What `prepare_rows` makes of such rows."""
    return Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in rows],
            "labels": [[-100, *ids[1:]] for ids, _ in rows],
            "completion_mask": [[int(label != -100) for label in labels] for _, labels in rows],
        }
    )


# --------------------------------------------------------------------- rows


def test_labels_cover_all_but_the_first_token_and_the_mask_keeps_the_boundary():
    tokenizer = tiny_tokenizer(adds_bos=True)
    answers, whole = (
        prepare_rows(ROWS, tokenizer, max_length=None, train_on_prompt=trains_prompt).dataset
        for trains_prompt in (False, True)
    )
    assert "completion_mask" not in answers.column_names
    for answer, row in zip(answers, whole, strict=True):
        assert row["input_ids"] == answer["input_ids"]
        assert row["labels"] == [-100, *row["input_ids"][1:]]
        assert row["completion_mask"] == [int(label != -100) for label in answer["labels"]]


def test_a_summary_counts_the_tokens_with_a_loss(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path), ["data.train_on_prompt=true"])
    whole = prepare_rows(ROWS, tiny_tokenizer(), max_length=None, train_on_prompt=True).dataset
    count = sum(label != -100 for row in whole for label in row["labels"])
    line = f"prompts are trained on too: {count} tokens with a loss in total"
    assert line in plan(recipe).rows
    assert line in preview(recipe).summary
    assert not any("prompts" in line for line in plan(load_recipe(tiny_recipe(tmp_path))).rows)


def test_the_plan_counts_logits_of_prompts(tmp_path):
    path = tiny_recipe(tmp_path)
    memory = [plan(load_recipe(path, [f"data.train_on_prompt={on}"])).memory for on in ("false", "true")]
    assert memory[1].activations > 1.2 * memory[0].activations
    assert memory[1].base == memory[0].base


def test_a_prompt_that_is_shortened_is_cut_with_its_mask():
    tokenizer = tiny_tokenizer(adds_bos=True)
    limits = {"max_length": 16, "on_overlength": "truncate_prompt"}
    prepared = prepare_rows(ROWS, tokenizer, **limits, train_on_prompt=True)
    assert prepared.counts.truncated > 0
    dataset = prepare_rows(ROWS, tokenizer, max_length=None, train_on_prompt=True).dataset
    checked, counts = check_tokenized_dataset(dataset, **limits, special=SpecialTokens.of(tokenizer), source="rows")
    assert counts == prepared.counts
    assert list(checked) == list(prepared.dataset)


def test_a_collator_on_either_side_keeps_the_mask_at_its_tokens():
    rows = some_rows(5)
    for side in ("left", "right"):
        collate_rows = RowCollator(lambda f, side=side: collate([(x["input_ids"], x["labels"]) for x in f], side))
        batch = collate_rows(list(whole_text(rows)))
        expected = collate(rows, side, train_on_prompt=True)
        assert torch.equal(batch["completion_mask"], expected["completion_mask"])


def test_a_collator_that_cuts_rows_is_refused():
    def cut(features):
        return {name: tensor[:, :3] for name, tensor in collator(features).items()}

    with pytest.raises(EchoDataError, match="the data collator turns rows of"):
        RowCollator(cut)(list(whole_text(some_rows(2))))


# ------------------------------------------------------------------ training


def trained(folder, model, rows=None, **kwargs):
    rows = some_rows() if rows is None else rows
    trainer = EchoTrainer(
        model=model, args=arguments(folder, **kwargs), train_dataset=whole_text(rows), data_collator=collator
    )
    trainer.train()
    return trainer


def fresh_echo_model(**config):
    torch.manual_seed(5)
    return get_echo_model(tiny_base(), lora_config(), EchoConfig(**ROUTED.to_dict() | config))


def test_accumulation_gives_one_gradient(tmp_path):
    adapters, losses = [], []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        model = fresh_echo_model()
        trainer = trained(
            tmp_path / str(batch),
            model,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
        )
        adapters.append(adapter_of(model))
        losses.append(
            [[log[k] for k in ("loss", "objective", "ce_prompt", "ce_off")] for log in trainer.state.log_history[:-1]]
        )
    for other, loss in zip(adapters[1:], losses[1:], strict=True):
        torch.testing.assert_close(torch.tensor(loss), torch.tensor(losses[0]), rtol=1e-4, atol=1e-5)
        for name, value in adapters[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_terms_are_logged_and_add_up_to_the_loss(tmp_path):
    logs = trained(tmp_path, fresh_echo_model(routing_schedule="constant")).state.log_history[:-1]
    assert len(logs) == 6
    for log in logs:
        assert log["ce_prompt"] > 0
        total = log["ce_prompt"] + log["ce_off"] + log["ce_on"] + log["distillation"]
        assert log["objective"] == pytest.approx(total, rel=1e-4)
        assert log["loss"] == pytest.approx(log["ce_prompt"] + log["ce_off"], rel=1e-6)
        assert 0 <= log["mean_token_accuracy"] <= 1
        assert log["ce_off"] == pytest.approx(log["ce_on"], rel=0.2)  # the same tokens


def test_without_routing_it_is_plain_lora_on_the_whole_text(tmp_path):
    """The arm without the echo, by the stock Trainer's own loss and count of tokens."""
    silent = fresh_echo_model(routing_schedule="constant", routing_start=0.0, routing_end=0.0)
    logs = trained(tmp_path / "echo", silent, gradient_accumulation_steps=2).state.log_history[:-1]
    torch.manual_seed(5)
    plain = peft.get_peft_model(tiny_base(), lora_config())
    plain_logs = trained(tmp_path / "plain", plain, gradient_accumulation_steps=2).state.log_history[:-1]
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in plain_logs], rel=1e-5)
    assert all("ce_prompt" not in log for log in plain_logs)
    of_plain = adapter_of(plain)
    assert of_plain.keys() == adapter_of(silent).keys()
    for name, value in adapter_of(silent).items():
        torch.testing.assert_close(value, of_plain[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_stock_trainer_counts_the_same_tokens(tmp_path):
    rows, models = some_rows(), [fresh_echo_model() for _ in range(2)]
    trained(tmp_path / "ours", models[0], rows)
    stock = Trainer(
        model=models[1],
        args=arguments(tmp_path / "stock", remove_unused_columns=False),
        train_dataset=whole_text(rows),
        data_collator=RowCollator(collator),
        callbacks=[EchoCallback()],
    )
    stock.train()
    assert all(torch.equal(v, adapter_of(models[1])[n]) for n, v in adapter_of(models[0]).items())


def test_a_resume_with_prompts_left_out_is_refused(tmp_path):
    rows = some_rows()
    trained(tmp_path, fresh_echo_model(), rows, save_strategy="steps", save_steps=3)
    moved = whole_text(rows)  # the same labels with the boundary elsewhere train something else
    moved = moved.map(lambda row: {"completion_mask": [0] * (len(row["labels"]) - 1) + [1]})
    answers = Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]})
    for data in (answers, moved):
        other = EchoTrainer(
            model=fresh_echo_model(), args=arguments(tmp_path), train_dataset=data, data_collator=collator
        )
        with pytest.raises(EchoCheckpointError, match=r"data\.sha256"):
            other.train(resume_from_checkpoint=True)


# ------------------------------------------------------------------- recipes


@pytest.mark.parametrize("echo", [True, False])
def test_a_recipe_trains_and_evaluates_on_the_whole_text(tmp_path, echo):
    path = tiny_recipe(tmp_path, data={"train": "train.jsonl", "validation": "test.jsonl", "train_on_prompt": True})
    result = run(load_recipe(path, [f"echo={json.dumps(echo)}", "training.evaluate_every=2"]))
    assert result.recipe["data"]["train_on_prompt"] is True
    assert ("ce_prompt" in result.final) == echo
    assert result.final["eval_loss"] > 0
    assert any(line.startswith("prompts are trained on too") for line in result.rows)


def test_without_routing_a_recipe_gives_the_adapter_of_its_plain_arm(tmp_path):
    path = tiny_recipe(tmp_path, lora={"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj"]})
    shared = ["data.train_on_prompt=true", "training.batch_size=2", "training.gradient_accumulation=3"]
    silent = ["echo_config.routing_start=0.0", "echo_config.routing_end=0.0"]
    results = [
        run(load_recipe(path, [*shared, *overrides, f"output={tmp_path / name}"]))
        for name, overrides in (("echo", silent), ("plain", ["echo=false"]))
    ]
    losses = [[entry["loss"] for entry in result.history if "loss" in entry] for result in results]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert results[0].initial_adapter_sha256 == results[1].initial_adapter_sha256


# ------------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", DATASETS)
def test_sft_trains_on_prompts_with_the_argument_of_trl(tmp_path, name):
    trainer = sft_trainer(tmp_path, DATASETS[name], completion_only_loss=False)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["ce_prompt"] > 0
    plain = sft_trainer(tmp_path / "plain", DATASETS[name], completion_only_loss=False, echo=None)
    plain.train()
    # at the first step the adapter is the same, and so are the tokens
    assert log["ce_prompt"] + log["ce_off"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-4)


def test_sft_evaluates_on_the_whole_text_and_the_echo_on_answers(tmp_path):
    trainer = sft_trainer(tmp_path, DATASETS["prompt-completion"], completion_only_loss=False)
    metrics = trainer.evaluate(trainer.train_dataset)
    of_rows = [(row["input_ids"], row["labels"], row["completion_mask"]) for row in trainer.train_dataset]
    trainer.model.eval()
    whole, answer = [], []
    for ids, labels, mask in of_rows:
        logits = trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        whole += losses.tolist()
        answer += losses[torch.tensor(mask[1:]).bool()].tolist()
        assert labels == ids
    assert len(answer) < len(whole)
    # Trainer's eval_loss is the mean of the batches' means
    assert metrics["eval_loss"] == pytest.approx(sum(whole) / len(whole), rel=0.05)
    assert metrics["eval_ce_off"] == pytest.approx(sum(answer) / len(answer), rel=1e-4)


def test_sft_without_the_argument_trains_on_answers_only(tmp_path):
    trainer = sft_trainer(tmp_path, DATASETS["prompt-completion"])
    trainer.train()
    assert "ce_prompt" not in trainer.state.log_history[0]


# ------------------------------------------------------------ weight of answers


def weighted_loss(model, rows: list[Row], weight: float) -> torch.Tensor:
    """(CE of prompt tokens + weight · CE of answer tokens) / number of tokens, row by row."""
    total, count = torch.zeros(()), 0
    for ids, labels in rows:
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        for t in range(1, len(ids)):
            total = total - (1 if labels[t] == -100 else weight) * log_probs[t - 1, ids[t]]
            count += 1
    return total / count


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("echo", [False, True])
def test_the_weight_of_answers_is_one_thing_with_and_without_the_echo(tmp_path, echo, accumulation):
    rows = some_rows(8)
    torch.manual_seed(5)
    base = tiny_base()
    if echo:  # never routed: what is left is LoRA
        config = dataclasses.replace(ROUTED, routing_start=0.0, routing_end=0.0)
        model = get_echo_model(base, lora_config(init_lora_weights=False), config)
    else:
        model = peft.get_peft_model(base, lora_config(init_lora_weights=False))
    expected = weighted_loss(model, rows, 1.6)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    args = sft_arguments(
        tmp_path,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        max_grad_norm=0.0,
        completion_only_loss=False,
    )
    seen: dict[str, torch.Tensor] = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    trainer = EchoSFTTrainer(
        model=model,
        args=args,
        train_dataset=whole_text(rows),
        processing_class=tiny_tokenizer(),
        callbacks=[Gradients()],
        answer_weight=1.6,
    )
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    logged = log.get("objective", log["loss"])
    assert logged == pytest.approx(expected.item(), abs=1e-4)  # rounded by the log
    assert {n for n in gradients if "lora_" in n} <= seen.keys()
    for name, gradient in gradients.items():
        error = (seen[name] - gradient).norm() / gradient.norm()
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("weight", "options", "words"),
    [
        (0.0, {}, "answer_weight = 0.0 must be a number above 0"),
        (2.0, {"completion_only_loss": True}, "only answers are trained on"),
        (2.0, {"loss_type": "dft"}, "loss_type='dft' can't be combined with answer_weight=2"),
        (2.0, {"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 can't be combined with answer_weight=2"),
    ],
)
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")  # TRL's own, and refused
def test_a_weight_of_answers_that_can_t_be_meant_is_refused(tmp_path, weight, options, words):
    rows = whole_text(some_rows(4))
    if options.get("completion_only_loss"):
        rows = rows.remove_columns("completion_mask")
    args = sft_arguments(tmp_path, **{"completion_only_loss": False} | options)
    model = peft.get_peft_model(tiny_base(), lora_config())
    with pytest.raises(EchoConfigError, match=words):
        EchoSFTTrainer(
            model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer(), answer_weight=weight
        )


def test_a_plain_trainer_can_t_weigh_answers_without_the_echo(tmp_path):
    model = peft.get_peft_model(tiny_base(), lora_config())
    with pytest.raises(EchoConfigError, match="Use EchoSFTTrainer"):
        EchoTrainer(
            model=model,
            args=arguments(tmp_path),
            train_dataset=whole_text(some_rows(4)),
            data_collator=collator,
            answer_weight=2.0,
        )


def test_answers_of_a_recipe_are_weighed(tmp_path):
    path = tiny_recipe(tmp_path)
    with pytest.raises(EchoConfigError, match=r"answer_weight = 2 weighs answers .* set data\.train_on_prompt"):
        load_recipe(path, ["training.answer_weight=2"])
    losses = []
    for place, weight in enumerate((1, 3)):
        options = ["data.train_on_prompt=true", f"training.answer_weight={weight}", "echo=false"]
        result = run(load_recipe(path, [*options, f"output={tmp_path / str(place)}"]))
        losses.append(result.history[0]["loss"])
    assert losses[1] > 1.3 * losses[0]
