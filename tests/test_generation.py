"""Answers of an adapter: prompted as in training, ended where training ended them, the same in batches as alone."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from echo_lora.adapter.merge import load_adapter
from echo_lora.data.tokenize import tokenize_row
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoDataError
from echo_lora.recipe.generation import Conversation, Stream, answer_rows, prompts_of
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.prepare import prepare
from echo_lora.recipe.speaker import Decoding, Speaker, load_speaker
from echo_lora.recipe.train import run
from test_cli import invoke
from tiny_recipe import ROWS, tiny_recipe, write_rows

GREEDY = Decoding(max_new_tokens=12)
CHAT_ROWS = [
    {"prompt": [{"role": "user", "content": row["prompt"]}], "completion": [{"role": "assistant", "content": "yes"}]}
    for row in ROWS
]
CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Count the words: one one."},
        {"role": "assistant", "content": "2 words"},
        {"role": "user", "content": "And one?"},
        {"role": "assistant", "content": "1 word"},
    ]
}


def trained_on(folder: Path, rows: list[dict] | None = None, **data) -> Path:
    """The output folder of a run whose adapter answers otherwise than its base."""
    path = tiny_recipe(folder, training={"steps": 12, "batch_size": 3, "learning_rate": 0.05, "log_every": 4})
    if rows is not None:
        write_rows(folder / "train.jsonl", rows)
        data["test"] = None
    run(load_recipe(path, [f"data.{name}={json.dumps(value)}" for name, value in data.items()]))
    return folder / "run"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return trained_on(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    return trained_on(tmp_path_factory.mktemp("chats"), CHAT_ROWS)


@pytest.fixture(scope="module")
def speaker(plain):
    return load_speaker(str(plain))


@pytest.fixture(scope="module")
def chat_speaker(chats):
    return load_speaker(str(chats))


def prompt_in_training(row: dict, speaker, chat: bool = False) -> list[int]:
    tokenized = tokenize_row(row, speaker.tokenizer, chat)
    return tokenized.input_ids[: tokenized.answer_start]


def questions(talk: Conversation, *texts: str) -> list[str]:
    return [talk.ask(text, lambda piece: None) for text in texts]


# ------------------------------------------------------------------------ the prompt


def test_plain_strings_are_prompted_as_in_training(speaker):
    assert not speaker.uses_template
    for row in ROWS:
        assert speaker.prompt_ids({"prompt": row["prompt"]}, "it") == prompt_in_training(row, speaker)


def test_chats_are_prompted_as_in_training(chat_speaker):
    assert chat_speaker.uses_template
    for row in CHAT_ROWS:
        assert chat_speaker.prompt_ids({"prompt": row["prompt"]}, "it") == prompt_in_training(row, chat_speaker)


def test_strings_that_training_put_through_the_template_go_through_it(tmp_path):
    speaker = load_speaker(str(trained_on(tmp_path, chat=True)))
    assert speaker.uses_template
    for row in ROWS:
        prompt = {"prompt": [{"role": "user", "content": row["prompt"]}]}
        assert speaker.prompt_ids(prompt, "it") == prompt_in_training(row, speaker, chat=True)


def test_the_second_turn_of_a_conversation_is_prompted_as_in_training(tmp_path, monkeypatch):
    speaker = load_speaker(str(trained_on(tmp_path, [CONVERSATION] * 3)))
    talk = Conversation(speaker, GREEDY, system="Be brief.")
    asked = []
    original = type(speaker).answers
    monkeypatch.setattr(
        type(speaker), "answers", lambda self, ids, *rest: asked.append(ids[0]) or original(self, ids, *rest)
    )
    questions(talk, "Count the words: one one.")
    talk.messages[-1]["content"] = "2 words"
    questions(talk, "And one?")
    row = {"prompt": CONVERSATION["messages"][:-1], "completion": CONVERSATION["messages"][-1:]}
    assert asked[1] == prompt_in_training(row, speaker)


def test_a_bos_token_that_the_tokenizer_adds_is_kept(plain, tmp_path):
    from tiny import tiny_tokenizer

    shutil.copytree(plain, tmp_path / "run")
    tiny_tokenizer(adds_bos=True).save_pretrained(tmp_path / "run" / "adapter")
    speaker = load_speaker(str(tmp_path / "run"))
    ids = speaker.prompt_ids({"prompt": ROWS[0]["prompt"]}, "it")
    assert ids[0] == speaker.tokenizer.bos_token_id
    assert ids == prompt_in_training(ROWS[0], speaker)


def test_the_adapter_s_own_chat_template_is_used(chats, tmp_path):
    shutil.copytree(chats, tmp_path / "run")
    template = tmp_path / "run" / "adapter" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "<|im_start|>dear "))
    speaker = load_speaker(str(tmp_path / "run"))
    ids = speaker.prompt_ids({"prompt": [{"role": "user", "content": "What?"}]}, "it")
    assert speaker.tokenizer.decode(ids).startswith("<|im_start|>dear user")


def test_a_run_without_the_record_is_prompted_by_its_rows(chats, tmp_path):
    shutil.copytree(chats, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    assert record.pop("is_chat") is True
    path.write_text(json.dumps(record))
    assert load_speaker(str(tmp_path / "run")).uses_template
    record["recipe"]["data"]["train"] = [{"file": str(tmp_path / "gone.jsonl")}]
    path.write_text(json.dumps(record))
    with pytest.raises(EchoConfigError, match=r"run\.json does not say how prompts .*--no-template"):
        load_speaker(str(tmp_path / "run"))
    assert not load_speaker(str(tmp_path / "run"), template=False).uses_template


def test_a_run_on_alpaca_rows_is_asked_in_their_layout(tmp_path):
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in ROWS]
    folder = trained_on(tmp_path, rows)
    speaker = load_speaker(str(folder))
    recipe = load_recipe(tmp_path / "recipe.yaml", ["data.test=null"])
    (data,) = prepare(recipe, ("train",))[1]["train"]
    trained = data.rows[0].input_ids[: data.rows[0].answer_start]
    assert speaker.prompt_ids({"prompt": ROWS[0]["prompt"]}, "it") == trained
    assert "### Response" in speaker.tokenizer.decode(trained)
    assert r'tokenizer("Below is an instruction that' in (folder / "adapter" / "README.md").read_text()
    # through the chat template there is no layout
    assert not load_speaker(str(folder), template=True).is_alpaca


def test_an_adapter_alone_uses_its_template_and_says_so(plain, tmp_path, capsys):
    shutil.copytree(plain / "adapter", tmp_path / "adapter")
    speaker = load_speaker(str(tmp_path / "adapter"))
    assert speaker.uses_template
    assert "using the chat template (--no-template for the other way)" in capsys.readouterr().err
    assert not load_speaker(str(tmp_path / "adapter"), template=False).uses_template


def test_a_system_message_needs_a_template_that_shows_it(speaker, chats, tmp_path):
    with pytest.raises(EchoConfigError, match="--system needs a chat template"):
        Conversation(speaker, GREEDY, system="Be brief.")
    shutil.copytree(chats, tmp_path / "run")
    template = tmp_path / "run" / "adapter" / "chat_template.jinja"
    start = "{% for message in messages %}"
    template.write_text(
        template.read_text().replace(start, "{% for message in messages if message['role'] != 'system' %}")
    )
    silent = Conversation(load_speaker(str(tmp_path / "run")), GREEDY, system="Be brief.")
    with pytest.raises(EchoConfigError, match="leaves out the text of --system"):
        questions(silent, "What?")


# ------------------------------------------------------------------------ the answer


def test_batches_give_the_tokens_of_one_row_at_a_time(speaker):
    prompts = [speaker.prompt_ids({"prompt": row["prompt"]}, "it") for row in ROWS]
    assert len(set(map(len, prompts))) > 4
    together = speaker.answers(prompts, GREEDY)
    assert together == [speaker.answers([prompt], GREEDY)[0] for prompt in prompts]
    assert len(set(map(tuple, together))) > 1


def test_rows_come_back_with_both_answers(speaker, plain):
    rows = [(f"row {i}", {"prompt": row["prompt"], "id": i}) for i, row in enumerate(ROWS)]
    answered = dict(answer_rows(speaker, rows, GREEDY, batch_size=5, with_base=True))
    assert sorted(answered) == list(range(12))
    assert [answered[i]["id"] for i in range(12)] == list(range(12))
    base = AutoModelForCausalLM.from_pretrained(plain.parent / "base")
    for column in ("generated_base", "generated"):
        model = base if column == "generated_base" else load_adapter(base, plain / "adapter")
        for i in (0, 11):
            ids = torch.tensor([speaker.prompt_ids({"prompt": ROWS[i]["prompt"]}, "it")])
            written = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
            assert answered[i][column] == speaker.tokenizer.decode(written, skip_special_tokens=True)
    assert any(row["generated"] != row["generated_base"] for row in answered.values())


def test_an_answer_ends_at_the_end_of_turn_that_training_taught(chat_speaker):
    end = chat_speaker.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in chat_speaker.ends
    assert end != chat_speaker.tokenizer.eos_token_id
    prompt = chat_speaker.prompt_ids(CHAT_ROWS[0], "it")
    (free,) = chat_speaker.answers([prompt], Decoding(max_new_tokens=40))
    assert 0 < len(free) < 40  # trained to say "yes" and to end
    assert chat_speaker.text(free) == "yes"


def test_a_stream_shows_the_answer_in_pieces(speaker):
    pieces: list[str] = []
    stream = Stream(speaker, pieces.append)
    prompt = speaker.prompt_ids({"prompt": ROWS[2]["prompt"]}, "it")
    (ids,) = speaker.answers([prompt], GREEDY, stream)
    assert "".join(pieces) == stream.shown == speaker.text(ids)
    assert len([piece for piece in pieces if piece]) > 3


def test_a_character_of_several_tokens_is_shown_whole(speaker):
    ids = speaker.tokenizer("é€", add_special_tokens=False)["input_ids"]
    assert len(ids) > 3
    pieces: list[str] = []
    stream = Stream(speaker, pieces.append)
    stream.put(torch.tensor([[1, 2]]))
    for token in [*ids, speaker.tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert [piece for piece in pieces if piece] == ["é", "€"]


def test_samples_repeat_with_their_seed(speaker):
    first, same, other = (
        Conversation(speaker, Decoding(12, temperature=1.5, seed=seed)).ask("Count", lambda piece: None)
        for seed in (1, 1, 2)
    )
    assert first == same != other


def test_a_temperature_that_logits_overflow_at_is_none(speaker):
    coldest, greedy = (
        Conversation(speaker, Decoding(4, temperature)).ask("Count", lambda piece: None) for temperature in (1e-320, 0)
    )
    assert coldest == greedy


def test_a_conversation_remembers_and_an_interrupted_answer_stays(chat_speaker):
    talk = Conversation(chat_speaker, Decoding(max_new_tokens=20))
    questions(talk, "Count the words: one .")
    assert [message["role"] for message in talk.messages] == ["user", "assistant"]

    def interrupt(piece: str) -> None:
        if piece:
            raise KeyboardInterrupt

    longer = Conversation(chat_speaker, Decoding(max_new_tokens=20), is_base=True)
    with pytest.raises(KeyboardInterrupt):
        longer.ask("What?", interrupt)
    assert chat_speaker.model.get_model_status().enabled is True
    assert longer.messages[1]["content"] == longer.messages[1]["content"].strip("\N{REPLACEMENT CHARACTER}") != ""
    questions(talk, "And?")
    assert len(talk.messages) == 4


def test_a_conversation_that_does_not_fit_is_refused_and_forgotten(chat_speaker):
    talk = Conversation(chat_speaker, GREEDY)
    with pytest.raises(EchoDataError, match=r"the limit of .*base is 256"):
        questions(talk, "word " * 300)
    assert talk.messages == []
    questions(talk, "word " * 75)  # an answer gets the room that is left


# ------------------------------------------------------------------------- the files


def test_prompts_are_lines_or_rows(tmp_path, chat_speaker):
    (tmp_path / "p.txt").write_text("one\n\n two \r\n", encoding="utf-8")
    assert [row["prompt"] for _, row in prompts_of(tmp_path / "p.txt")] == ["one", " two "]
    rows = [{"prompt": "one"}, CONVERSATION, CHAT_ROWS[0]]
    read = prompts_of(write_rows(tmp_path / "p.jsonl", rows))
    answered = dict(answer_rows(chat_speaker, read, GREEDY, batch_size=3))
    assert answered[1]["messages"] == CONVERSATION["messages"]
    assert answered[2]["completion"] == CHAT_ROWS[0]["completion"]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "one"}, {"question": "two"}], r"p\.jsonl:2: row 1 has neither prompt nor messages"),
        ([{"prompt": "one"}, {"prompt": "x", "generated": "y"}], r"p\.jsonl:2: row 1 has a column 'generated'"),
        ([{"prompt": "one"}, {"prompt": "word " * 300}], r"p\.jsonl:2: row 1 has \d+ tokens .* limit"),
        ([{"prompt": "one"}, {"prompt": ""}], r"p\.jsonl:2: row 1 has an empty prompt"),
        ([{"prompt": "one"}, {"prompt": 3}], r"p\.jsonl:2: row 1: prompt is not a list of messages"),
        ([{"prompt": "one"}, {"messages": "two"}], r"p\.jsonl:2: row 1: messages is not a list of messages"),
    ],
)
def test_generate_names_a_bad_row_and_writes_nothing(plain, tmp_path, rows, expected):
    prompts, output = write_rows(tmp_path / "p.jsonl", rows), tmp_path / "a.jsonl"
    result = invoke("generate", plain, prompts, "--output", output, "--max-new-tokens", 4, code=1)
    assert re.search(expected, result.stderr)
    assert sorted(tmp_path.iterdir()) == [prompts]


def test_generate_never_replaces_a_file(plain, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl")
    before = prompts.read_bytes()
    assert "exists" in invoke("generate", plain, prompts, "--output", prompts, code=1).stderr
    assert prompts.read_bytes() == before


def test_an_interrupted_generate_writes_nothing_and_says_so(plain, tmp_path, monkeypatch):
    original, batches = Speaker.answers, []

    def answers(self, *args):
        if batches:
            raise KeyboardInterrupt
        batches.append(args)
        return original(self, *args)

    monkeypatch.setattr(Speaker, "answers", answers)
    prompts = write_rows(tmp_path / "p.jsonl")
    options = ("--batch-size", 5, "--max-new-tokens", 2, "--output", tmp_path / "a.jsonl")
    stderr = invoke("generate", plain, prompts, *options, code=130).stderr
    assert stderr.endswith(f"Interrupted after 5 of 12 prompts. {tmp_path / 'a.jsonl'} was not written.\n")
    assert list(tmp_path.iterdir()) == [prompts]


def test_generate_writes_rows_in_order(plain, tmp_path):
    (tmp_path / "p.txt").write_text("Count the words: one .\nCount the words: one one one one .\n")
    output = tmp_path / "new" / "a.jsonl"
    tokens = ("--max-new-tokens", 6)
    result = invoke("generate", plain, tmp_path / "p.txt", "--output", output, "--base", *tokens)
    assert result.stdout == f"Written to {output}\n"
    assert "2/2" in result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"].count("one") for row in rows] == [1, 4]
    assert rows[0].keys() == {"prompt", "generated", "generated_base"}
    one = invoke("chat", plain, "--prompt", rows[1]["prompt"], *tokens).stdout
    assert one == rows[1]["generated"] + "\n"


# ------------------------------------------------------------------------- the command


def test_chat_answers_one_prompt_with_the_base_beside_it(chats):
    output = invoke("chat", chats, "--prompt", CHAT_ROWS[0]["prompt"][0]["content"], "--base").stdout
    adapter, base = output.split("base: ")
    assert adapter == "adapter: yes\n"
    assert base.strip() != "yes"


def test_chat_reads_a_prompt_per_line_without_a_terminal(chats):
    from typer.testing import CliRunner

    from echo_lora.cli import app

    lines = "Count the words: one .\n\n/reset\nCount the words: one .\n/quit\nnever asked\n"
    result = CliRunner().invoke(app, ["chat", str(chats)], input=lines, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert result.stdout == "yes\nyes\n"
    assert "\x1b" not in result.output


def test_an_untrained_recipe_and_a_missing_base_say_what_to_do(tmp_path, plain):
    with pytest.raises(EchoCheckpointError, match=r"has no adapter yet\. Train it first: echo-lora train"):
        load_speaker(str(tiny_recipe(tmp_path)))
    shutil.copytree(plain / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    named = json.loads(config.read_text())
    config.write_text(json.dumps(named | {"base_model_name_or_path": "nobody/nothing"}))
    stderr = invoke("chat", tmp_path / "adapter", "--prompt", "x", code=1).stderr
    assert "nobody/nothing" in stderr
    assert "A hub model needs a connection or an earlier download" in stderr
    base = plain.parent / "base"
    assert invoke("chat", tmp_path / "adapter", "--prompt", "x", "--base-model", base, "--max-new-tokens", 2).stdout
    config.write_text(json.dumps(named | {"base_model_name_or_path": None}))
    assert "Name it with --base-model" in invoke("chat", tmp_path / "adapter", "--prompt", "x", code=1).stderr


def test_the_base_of_an_adapter_that_changes_it_can_not_answer(plain, tmp_path):
    shutil.copytree(plain / "adapter", tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    with pytest.raises(EchoConfigError, match="changes the base's weights on loading"):
        load_speaker(str(tmp_path / "adapter"), with_base=True)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_at_a_terminal_ctrl_c_ends_the_answer_and_ctrl_d_the_conversation(chats):
    import pty

    code = "from echo_lora.cli import app; app()"
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a run in the background ignores it
        os.execv(sys.executable, [sys.executable, "-c", code, "chat", str(chats)])
    seen = ""

    def has_come(text: str, seconds: float) -> bool:
        nonlocal seen
        while text not in seen:
            if not select.select([terminal], [], [], seconds)[0]:
                return False
            seen += os.read(terminal, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]
        return True

    def press(key: bytes, text: str) -> None:
        """Again and again: the first may still interrupt the answer."""
        for _ in range(30):
            os.write(terminal, key)
            if has_come(text, 3):
                return
        raise AssertionError(f"no {text!r} after: {seen}")

    assert has_come("Ctrl-C interrupts.", 90)
    assert has_come("> ", 90)
    os.write(terminal, b"Count the words: one .\n")
    assert has_come("one .", 90)  # the terminal's echo
    press(b"\x03", "/quit or Ctrl-D ends.")
    assert has_come("> ", 90)
    os.write(terminal, b"\x04")
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
