"""Every causal language model that transformers knows is exact, or refused when it is wrapped; docs/architectures.md.

`python tests/test_architectures.py` writes the table of that page.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

import echo_lora
from architectures import Row
from echo_lora import EchoModel
from echo_lora.errors import EchoModelError
from every_architecture import NAMES, UNTRIED, VARIANTS, tiny_echo_model_of, tiny_model
from oracle import oracle_step
from test_oracle import assert_equals_oracle, gradients, mixed_rows, stacked_scalars

PAGE = Path(echo_lora.__file__).parent.parent.parent / "docs" / "architectures.md"
BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"

# Of each kind one: recurrent, hybrid, convolving, mixtures of experts, latent and indexed attention, positions of
# their own or by column, ALiBi, sinks, chunks, and what is refused.
QUICK = [
    *("rwkv", "recurrent_gemma", "xlstm", "mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "falcon_h1", "zamba"),
    *("zamba2", "nemotron_h", "granitemoehybrid", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "lfm2", "lfm3"),
    *(
        "kimi_linear",
        "minimax",
        "gpt_oss",
        "qwen3_moe",
        "olmoe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "jetmoe",
    ),
    *("minicpm3", "bart", "xglm", "biogpt", "bloom", "mpt", "falcon", "falcon (alibi=True)", "openai-gpt", "gptj"),
    *("roberta (is_decoder=True)", "bert (is_decoder=True)", "llama4_text", "cohere2", "gemma3", "gpt_neo", "doge"),
    *("bert", "xlnet", "xlm", "gemma3n_text", "hy_v4"),
]


def verdict(name: str) -> tuple[str, str]:
    """("shared", ""), ("full", why) or ("refused", why); fails where neither pass is exact, nor the model refused."""
    try:
        model = tiny_echo_model_of(name)
    except EchoModelError as error:
        return "refused", str(error)
    for side, rows in (("left", mixed_rows()), ("right", mixed_rows(2))):
        assert_exact(model, rows, side)
    reason = model.why_full(model.device)
    if reason is None:
        assert_exact(tiny_echo_model_of(name, echo_step="full"), mixed_rows(), "left")
        return "shared", ""
    return "full", reason


def assert_exact(model: EchoModel, rows: list[Row], side: str) -> None:
    """Within the project's bound, or within ten times what rounding alone does to the oracle itself.

    Random models that normalise queries and keys amplify it: to 1e-4 in Gemma 4, between rows alone and rows together.
    """
    try:
        assert_equals_oracle(model, rows, side=side)
    except AssertionError:
        rounding = rounding_of_oracle(model, rows)
        assert rounding < 5e-4
        assert_equals_oracle(model, rows, side=side, bound=10 * rounding)


def rounding_of_oracle(model: EchoModel, rows: list[Row]) -> float:
    """The largest relative difference between gradients of rows run alone and padded on the right."""
    found = []
    for together in (False, True):
        config = model.echo_config
        model.zero_grad()
        oracle_step(model, rows, source_layers=config.source_layers, config=config, together=together).loss.backward()
        found.append(stacked_scalars(gradients(model)))
    largest = max(g.norm() for g in found[0].values())
    differences = [(found[1][n] - g).norm() / g.norm().clamp(min=1e-2 * largest) for n, g in found[0].items()]
    return float(max(differences))


@pytest.mark.parametrize("name", QUICK)
def test_one_of_each_kind(name):
    expected = table_of(PAGE.read_text(encoding="utf-8"))[name]
    assert verdict(name)[0] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_one(name):
    """The line of the page is what is found, where the page is of this release; else it is exact or refused."""
    page = PAGE.read_text(encoding="utf-8")
    if name not in table_of(page):
        try:
            tiny_model(name)
        except Exception as error:
            pytest.skip(f"newer than the page, and it takes other sizes: {error}")
    found = line(name, *verdict(name))
    if release_of(page) == transformers.__version__:
        assert found in page.split(BEGIN)[1].split(END)[0].splitlines(), found


def test_the_page_has_a_line_for_each_name_and_counts_them():
    page = PAGE.read_text(encoding="utf-8")
    if release_of(page) != transformers.__version__:
        pytest.skip(f"the table is that of transformers {release_of(page)}")
    kinds = table_of(page)
    assert kinds.keys() == set(NAMES)
    assert page.split(BEGIN)[1].splitlines()[1] == head(kinds)


def release_of(page: str) -> str | None:
    found = re.search(r"^transformers (\S+), ", page, re.MULTILINE)
    return found and found[1]


def head(kinds: dict[str, str]) -> str:
    counts = [f"{list(kinds.values()).count(kind)} {kind}" for kind in ("shared", "full", "refused")]
    return f"transformers {transformers.__version__}, {len(kinds)} model types: {', '.join(counts)}."


def line(name: str, kind: str, why: str) -> str:
    return f"| {name} | {kind} | {short(why)} |"


def table(verdicts: dict[str, tuple[str, str]]) -> str:
    """The table in Markdown: a line for each architecture."""
    lines = ["| model type | second pass | why |", "|---|---|---|"]
    lines += [line(name, *found) for name, found in sorted(verdicts.items())]
    untried = "; ".join(f"{name}: {why}" for name, why in sorted(UNTRIED.items()))
    kinds = {name: kind for name, (kind, _) in verdicts.items()}
    return "\n".join([head(kinds), "", *lines, "", f"Not tried: {untried}."])


def short(why: str) -> str:
    return re.split(r"[.] |, so |, but ", why)[0].replace("|", "/").replace("\n", " ")


def table_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (.+?) \| (shared|full|refused) \|", page, re.MULTILINE))


def test_variants_are_named_after_what_they_vary():
    assert all(name.split(" (")[0] == model_type for name, (model_type, _) in VARIANTS.items())


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    found = table({name: verdict(name) for name in NAMES})
    PAGE.write_text(f"{before}{BEGIN}\n{found}\n{END}{rest.split(END)[1]}", encoding="utf-8")
