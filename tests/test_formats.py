"""Data as people have it: every kind of file, every format, and exactly which tokens are trained on."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st

from echo_lora.data.formats import ALPACA_SYSTEM, ALPACA_SYSTEM_WITH_INPUT, SPEAKERS, find_format
from echo_lora.data.loaded import Loaded
from echo_lora.data.sources import RowFile, is_hub_name, read_rows
from echo_lora.data.tokenize import IGNORED
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.prepare import prepare, preview
from echo_lora.recipe.rows import evaluation_rows
from echo_lora.recipe.table import recipe_table
from tiny import tiny_tokenizer
from tiny_recipe import tiny_recipe

TOKENIZER = tiny_tokenizer()
ROOT = Path(__file__).parent.parent

PLAIN = [
    {"prompt": "What is the capital?", "completion": " Paris"},
    {"prompt": "Count to 007, None or NA:", "completion": " 007\nNone, NA"},
]
ALPACA = [
    {"instruction": "Add the numbers.", "input": "3 and 4", "output": "7"},
    {"instruction": "Say yes.", "input": "", "output": "yes"},
]
SHAREGPT = [
    {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "One?"},
            {"from": "gpt", "value": "one"},
            {"from": "human", "value": "Two?"},
            {"from": "gpt", "value": "two"},
        ]
    }
]
OPENAI = [
    {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "one"}]},
    {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "two"}]},
]


def zipped(content: bytes) -> bytes:
    """Without a time, which would give tests other names in every process."""
    return gzip.compress(content, mtime=0)


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_table(path, rows, comma=",", opener=open):
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=comma)
        writer.writeheader()
        writer.writerows(rows)


def write_arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_zst(path, content):
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(content)


def write_file(folder, kind, rows=PLAIN):
    """A file with the rows, and the name by which a recipe has it."""
    folder.mkdir(exist_ok=True)
    (folder / "parts").mkdir(exist_ok=True)
    writers = {
        "rows.json": lambda path: path.write_text(json.dumps(rows, indent=1)),
        "rows.jsonl": lambda path: path.write_bytes(jsonl(rows)),
        "rows.ndjson": lambda path: path.write_bytes(jsonl(rows)),
        "rows.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(rows))),
        "rows.json.bz2": lambda path: path.write_bytes(bz2.compress(json.dumps(rows).encode())),
        "rows.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl(rows))),
        "rows.jsonl.zst": lambda path: write_zst(path, jsonl(rows)),
        "rows.csv": lambda path: write_table(path, rows),
        "semicolons.csv": lambda path: write_table(path, rows, ";"),
        "rows.CSV.GZ": lambda path: write_table(path, rows, opener=gzip.open),
        "rows.tsv": lambda path: write_table(path, rows, "\t"),
        "rows.parquet": lambda path: pq.write_table(pa.Table.from_pylist(rows), path),
        "rows [1].arrow": lambda path: write_arrow(path, rows),
        "saved": lambda path: Dataset.from_list(rows).save_to_disk(path),
        "splits": lambda path: DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(path),
        "repository": lambda path: (path.mkdir(), pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")),
        "parts/*.jsonl": lambda path: [
            (path.parent / f"{place}.jsonl").write_bytes(jsonl([row])) for place, row in enumerate(rows)
        ],
    }
    writers[kind](folder / kind)
    return kind


KINDS = [
    *("rows.json", "rows.jsonl", "rows.ndjson", "rows.jsonl.gz", "rows.json.bz2", "rows.jsonl.xz", "rows.jsonl.zst"),
    *("rows.csv", "semicolons.csv", "rows.CSV.GZ", "rows.tsv", "rows.parquet", "rows [1].arrow"),
    *("saved", "splits", "repository", "parts/*.jsonl"),
]


def recipe_of(folder, data, *overrides):
    return load_recipe(tiny_recipe(folder, data=data), overrides)


def trained(recipe, split="train"):
    """Text of the prompt's tokens and of those that are trained on, of each row."""
    found = []
    for data in prepare(recipe)[1][split]:
        for row in data.rows:
            read = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORED]
            learned = [label for label in row.labels if label != IGNORED]
            found.append((TOKENIZER.decode(read), TOKENIZER.decode(learned)))
    return found


# ------------------------------------------------------------------- kinds of files


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_every_kind_trains_on_the_same_tokens(tmp_path, kind):
    name = write_file(tmp_path, kind)
    assert trained(recipe_of(tmp_path, {"train": name})) == [
        (row["prompt"], row["completion"] + "</s>") for row in PLAIN
    ]


def test_text_has_no_boundary_and_is_refused_by_name(tmp_path):
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    assert read_rows(tmp_path / "words.txt") == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(EchoDataError, match=r"words\.txt: row 0 has only text: .* Split it into prompt and completion"):
        prepare(recipe_of(tmp_path, {"train": "words.txt"}))


def test_a_large_file_of_datasets_is_read_row_by_row(tmp_path):
    write_arrow(tmp_path / "rows.arrow", PLAIN * 5000)
    Dataset.from_list(PLAIN * 5000).save_to_disk(tmp_path / "saved")
    for rows in (RowFile(tmp_path / "rows.arrow"), Loaded(str(tmp_path / "saved"), "train")):
        assert not isinstance(rows, list)
        assert next(iter(rows)) == PLAIN[0]
        assert sum(1 for _ in rows) == 10_000


def test_numbers_of_a_table_are_numbers_where_no_text_is_read(tmp_path):
    rows = [row | {"id": str(place), "score": "0.5"} for place, row in enumerate(PLAIN)]
    write_table(tmp_path / "rows.csv", rows)
    assert len(trained(recipe_of(tmp_path, {"train": "rows.csv"}))) == 2
    write_table(tmp_path / "rows.csv", [row | {"weight": "0.5"} for row in PLAIN])
    with pytest.raises(EchoDataError, match=r"rows\.csv: row 0 has weight: rows have no weights"):
        prepare(recipe_of(tmp_path, {"train": "rows.csv"}))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.csv",
            b"prompt,completion\na,b\na,b,c\n",
            r"rows\.csv:3: the row that ends here has 3 cells, .* 2 columns",
        ),
        ("rows.csv", b"prompt,completion\na\n", r"rows\.csv:2: the row that ends here has 1 cells"),
        ("rows.csv", b"prompt,prompt\na,b\n", r"rows\.csv has the column 'prompt' twice"),
        ("rows.csv", b"prompt,completion\na,\xff\n", r"rows\.csv is not UTF-8 text"),
        ("rows.csv", b'prompt,completion\na,"b\n', r"rows\.csv is not a table: unexpected end of data"),
        ("rows.csv", b"prompt,completion\n", r"rows\.csv has no row"),
        ("rows.jsonl.gz", b"no gzip", r"rows\.jsonl\.gz can't be decompressed: Not a gzipped file"),
        (
            "rows.jsonl.gz",
            zipped(jsonl(PLAIN))[:-9],
            r"rows\.jsonl\.gz can't be decompressed: Compressed file",
        ),
        ("rows.jsonl.xz", b"no xz", r"rows\.jsonl\.xz can't be decompressed"),
        (
            "rows.jsonl.gz",
            zipped(b'{"prompt": "a", "completion": "b"}\n{'),
            r"rows\.jsonl\.gz:2: not JSON",
        ),
        ("rows.arrow", b"no arrow", r"rows\.arrow can't be read as arrow"),
        ("rows.parquet", b"no parquet", r"rows\.parquet can't be read as Parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EchoDataError, match=message):
        read_rows(tmp_path / name)


def test_each_file_of_a_pattern_is_named_in_errors_and_the_summary(tmp_path):
    write_file(tmp_path, "parts/*.jsonl")
    recipe = recipe_of(tmp_path, {"train": "parts/*.jsonl", "test": "parts/*.jsonl"})
    shown = preview(recipe)
    assert [where.rpartition("parts")[2][1:] for where, _ in shown.rows] == ["0.jsonl: row 0", "1.jsonl: row 0"]
    [(_, rows)] = evaluation_rows(recipe, TOKENIZER)
    assert [row["answer"] for row in rows] == [row["completion"] for row in PLAIN]
    (tmp_path / "parts" / "1.jsonl").write_text('{"prompt": "a", "completion": ""}\n')
    with pytest.raises(EchoDataError, match=r"1\.jsonl:1: row 0 has an empty answer"):
        prepare(recipe)
    with pytest.raises(EchoDataError, match=r"none-\*\.jsonl: no file matches this pattern"):
        prepare(recipe_of(tmp_path, {"train": "none-*.jsonl"}))


def test_the_split_of_a_folder_is_that_of_the_key_or_its_own(tmp_path):
    write_splits = DatasetDict({"train": Dataset.from_list(PLAIN[:1]), "dev": Dataset.from_list(PLAIN[1:])})
    write_splits.save_to_disk(tmp_path / "saved")
    data = {"train": "saved", "validation": {"file": "saved", "split": "dev"}}
    assert trained(recipe_of(tmp_path, data), "validation")[0][0] == PLAIN[1]["prompt"]
    with pytest.raises(EchoDataError, match=r"saved has no split 'validation': .* It has train, dev\. Set split"):
        prepare(recipe_of(tmp_path, data | {"validation": "saved"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(EchoDataError, match="empty can't be loaded as a folder of rows"):
        prepare(recipe_of(tmp_path, {"train": "empty"}))
    with pytest.raises(EchoDataError, match=r"train\.jsonl is a file: it has no splits"):
        prepare(recipe_of(tmp_path, {"train": {"file": "train.jsonl", "split": "train"}}))


# ------------------------------------------------------------------------ the hub


def test_a_name_of_the_hub_is_passed_to_datasets(tmp_path, monkeypatch):
    calls = []

    def load_dataset(name, config, **options):
        calls.append((name, config, options))
        return Dataset.from_list(PLAIN)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    named = {"hub": "owner/name", "split": "dev", "revision": "abc", "config": "en"}
    recipe = recipe_of(tmp_path, {"train": "owner/other", "validation": named})
    assert [source.hub for source in recipe.data.train] == ["owner/other"]
    assert trained(recipe)[0] == (PLAIN[0]["prompt"], PLAIN[0]["completion"] + "</s>")
    assert calls[0] == ("owner/other", None, {"split": "train", "revision": None, "streaming": False})
    assert ("owner/name", "en", {"split": "dev", "revision": "abc", "streaming": False}) in calls


def test_a_name_that_is_no_file_is_looked_for_on_the_hub(tmp_path):
    assert is_hub_name("owner/name", tmp_path)
    with pytest.raises(EchoConfigError, match=r"'\.\./x' is no name of the hub; write it as owner/name"):
        recipe_of(tmp_path, {"train": {"hub": "../x"}})
    (tmp_path / "owner").mkdir()
    for text in ("owner/name", "rows.jsonl", "data/rows.csv", "a/b/c", "./a/b", "data/*.json"):
        assert not is_hub_name(text, tmp_path), text
    with pytest.raises(
        EchoDataError, match=r"nobody/none is neither a file nor a folder here, and could not be loaded"
    ):
        prepare(recipe_of(tmp_path, {"train": "nobody/none"}))
    with pytest.raises(EchoDataError, match=r"there is no such file"):
        prepare(recipe_of(tmp_path, {"train": "owner/name"}))


# ------------------------------------------------------------------------- formats


def test_alpaca_has_its_layout_and_no_column_is_lost(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    assert trained(recipe_of(tmp_path, {"train": "alpaca.json"})) == [
        (
            f"{ALPACA_SYSTEM_WITH_INPUT}\n\n### Instruction:\nAdd the numbers.\n\n"
            "### Input:\n3 and 4\n\n### Response:\n",
            "7</s>",
        ),
        (f"{ALPACA_SYSTEM}\n\n### Instruction:\nSay yes.\n\n### Response:\n", "yes</s>"),
    ]


def test_alpaca_in_a_chat_is_a_message_of_the_user(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA[0], ALPACA[1] | {"system": "Be brief."}]))
    assert trained(recipe_of(tmp_path, {"train": "alpaca.json", "chat": True})) == [
        (
            "<|im_start|>user\nAdd the numbers.\n\n3 and 4<|im_end|>\n<|im_start|>assistant\n",
            "7<|im_end|>\n",
        ),
        (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n",
            "yes<|im_end|>\n",
        ),
    ]


def test_sharegpt_trains_on_every_turn_of_gpt(tmp_path):
    (tmp_path / "chats.json").write_text(json.dumps(SHAREGPT))
    [(_, learned)] = trained(recipe_of(tmp_path, {"train": "chats.json"}))
    assert learned == "one<|im_end|>two<|im_end|>"


def test_openai_messages_take_a_system_column(tmp_path):
    (tmp_path / "chats.jsonl").write_bytes(jsonl([row | {"system": "Be brief."} for row in OPENAI]))
    for (read, learned), word in zip(
        trained(recipe_of(tmp_path, {"train": "chats.jsonl"})), ["one", "two"], strict=True
    ):
        assert read.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert learned == f"{word}<|im_end|>"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (PLAIN, "prompt_completion (columns prompt, completion)"),
        (ALPACA, "alpaca (columns instruction, input, output)"),
        (SHAREGPT, "sharegpt (column conversations)"),
        ([{"messages": SHAREGPT[0]["conversations"]}], "sharegpt (column messages)"),
        (OPENAI, "messages (column messages)"),
        ([{"conversations": OPENAI[0]["messages"], "system": "Be brief."}], "messages (columns conversations, system)"),
        ([PLAIN[0] | ALPACA[0]], "prompt_completion (columns prompt, completion)"),
        ([{"question": "a", "answer": "b"}], "no known format (columns question, answer)"),
        ([{"instruction": "a", "output": "b"}, ALPACA[0]], "alpaca (columns instruction, input, output)"),
    ],
)
def test_auto_says_what_it_found_and_why(rows, reason):
    assert find_format(rows).reason == reason
    assert find_format(iter(rows)).reason == reason


def test_the_format_is_in_preview_and_a_mapping_is_applied_first(tmp_path):
    rows = [{"question": row["instruction"], "context": row["input"], "reply": row["output"]} for row in ALPACA]
    (tmp_path / "dolly.json").write_text(json.dumps(rows))
    columns = {"instruction": "question", "input": "context", "output": "reply"}
    recipe = recipe_of(tmp_path, {"train": "dolly.json", "columns": columns})
    assert any(
        line.endswith("dolly.json: alpaca (columns instruction, input, output)") for line in preview(recipe).summary
    )
    assert "3 and 4" in trained(recipe)[0][0]
    unmapped = recipe_of(tmp_path, {"train": "dolly.json"})
    with pytest.raises(
        EchoDataError, match=r"row 0 has no prompt\. Present: question, context, reply\. .*data\.columns"
    ):
        prepare(unmapped)


def test_text_that_the_format_does_not_use_is_an_error_with_the_way(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps([row | {"topic": "sums"} for row in ALPACA]))
    with pytest.raises(
        EchoDataError, match=r"column 'topic'.*map it with data\.columns.*data\.ignore_columns to \[topic\]"
    ):
        prepare(recipe_of(tmp_path, {"train": "alpaca.json"}))
    assert len(trained(recipe_of(tmp_path, {"train": "alpaca.json", "ignore_columns": ["topic"]}))) == 2


@pytest.mark.parametrize(
    ("wanted", "rows", "message"),
    [
        ("auto", [ALPACA[0], {"instruction": "a"}], r"rows\.jsonl:2: row 1 has no output"),
        ("auto", [ALPACA[0], ALPACA[0] | {"input": ["a"]}], r"rows\.jsonl:2: row 1: input is a list, not a string"),
        ("auto", [ALPACA[0], {"output": "a"}], r"rows\.jsonl:2: row 1: instruction is empty"),
        ("auto", [ALPACA[0], PLAIN[0]], r"rows\.jsonl:2: row 1 has no completion|rows\.jsonl:1: row 0 has no prompt"),
        ("alpaca", [ALPACA[0], PLAIN[0] | ALPACA[0]], r"rows\.jsonl:2: row 1 has a column 'prompt' beside"),
        (
            "auto",
            [*SHAREGPT, {"conversations": [{"from": "cat", "value": "a"}]}],
            r"row 1: conversations\[0\] is from 'cat'",
        ),
        (
            "auto",
            [*SHAREGPT, {"conversations": [{"role": "user", "content": "a"}]}],
            r"conversations\[0\] is not a turn",
        ),
        ("auto", [*SHAREGPT, {"conversations": "a"}], r"row 1: conversations is not a list of turns"),
        ("auto", [*SHAREGPT, {"conversations": [{"from": "gpt", "value": 3}]}], r"content is a int"),
        ("auto", [SHAREGPT[0] | {"system": "a"}], r"row 0 has a system message in its column 'system' and another"),
        ("alpaca", PLAIN, r"is not alpaca: it has no column 'instruction'\..*They look like prompt_completion"),
        ("sharegpt", OPENAI, r"row 0: messages\[0\] is not a turn"),
        ("messages", ALPACA, r"is not messages: it has no column 'messages'\. Present: instruction, input, output\."),
    ],
)
def test_a_row_that_does_not_fit_the_format_is_named(tmp_path, wanted, rows, message):
    (tmp_path / "rows.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(EchoDataError, match=message):
        prepare(recipe_of(tmp_path, {"train": "rows.jsonl", "format": wanted}))


words = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(words, st.text(st.characters(codec="utf-8")), words, st.booleans())
def test_alpaca_keeps_every_text(instruction, given_text, output, chat):
    row = {"instruction": instruction, "input": given_text, "output": output}
    converted = find_format([row], chat=chat).convert(row, "row 0")
    assert set(converted) == {"prompt", "completion"}
    assert converted["completion"] == output
    assert instruction in converted["prompt"]
    assert not given_text.strip() or given_text in converted["prompt"]


@given(st.lists(st.tuples(st.sampled_from(list(SPEAKERS)), words), min_size=1))
def test_sharegpt_keeps_every_turn_in_its_order(turns):
    row = {"conversations": [{"from": speaker, "value": text} for speaker, text in turns], "id": 3}
    converted = find_format([row], "sharegpt").convert(row, "row 0")
    messages = [{"role": SPEAKERS[speaker], "content": text} for speaker, text in turns]
    assert converted == {"messages": messages, "id": 3}


# -------------------------------------------------------------------------- imports

PREVIEW = """
import sys
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.prepare import preview
assert preview(load_recipe(sys.argv[1])).rows
print([name for name in ("trl", "peft", "transformers.trainer") if name in sys.modules])
if sys.argv[2:]:
    import echo_lora.recipe.plan
    print([name for name in ("trl", "peft", "transformers.trainer") if name in sys.modules])
"""


def test_preview_imports_no_trainer(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PREVIEW, str(tiny_recipe(tmp_path)), "and plan"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.splitlines()
    assert before == "[]"
    assert "trl" in after  # the check does see what plan imports


def test_an_ignored_column_takes_no_part_in_a_format(tmp_path):
    (tmp_path / "alpaca.json").write_text(json.dumps([ALPACA[0] | {"system": "Be brief."}]))
    data = {"train": "alpaca.json", "chat": True, "ignore_columns": ["system", "input"]}
    assert trained(recipe_of(tmp_path, data)) == [
        ("<|im_start|>user\nAdd the numbers.<|im_end|>\n<|im_start|>assistant\n", "7<|im_end|>\n")
    ]


def test_the_examples_of_the_page_train_on_what_it_says(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Formats")[2].partition("## Files")[0]
    questions = [{"question": row["prompt"], "answer": row["completion"]} for row in PLAIN]
    write_table(tmp_path / "questions.csv", questions)
    (tmp_path / "alpaca_data.json").write_text(json.dumps(ALPACA))
    (tmp_path / "sharegpt.json").write_text(json.dumps(SHAREGPT))
    tiny_recipe(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(jsonl(OPENAI))
    found = []
    for text in re.findall(r"^```yaml\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
        recipe = load_recipe(tmp_path / "mine.yaml", [f"model={tmp_path / 'base'}"])
        found.append((preview(recipe).summary[0].partition(": ")[2], trained(recipe)[-1][1]))
    assert found == [
        ("prompt_completion (columns prompt, completion)", " 007\nNone, NA<|im_end|>\n"),
        ("messages (column messages)", "two<|im_end|>"),
        ("alpaca (columns instruction, input, output)", "yes<|im_end|>\n"),
        ("sharegpt (column conversations)", "one<|im_end|>two<|im_end|>"),
    ]


def test_every_new_key_is_in_the_table():
    keys = {key for key, *_ in recipe_table()}
    assert keys >= {"data.format", "data.stream", "data.validation_share", "<source>.hub", "<source>.weight"}
