"""The model cards of an adapter and of a merged model: README.md, with the metadata that the hub reads."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from echo_lora.data.formats import alpaca_prompt
from echo_lora.errors import EchoCheckpointError
from echo_lora.method import losses
from echo_lora.method.config import EchoConfig
from echo_lora.method.variants import changes_base
from echo_lora.packaged import LICENSE
from echo_lora.text import template_environment

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"

METHODS = {"lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA"}

CARD_METRICS = (
    *("loss", "eval_loss", *losses.SHOWN),
    *("mean_token_accuracy", "echo_norm", "gate_mean"),
)

TAGS = ["lora", "transformers"]  # as PEFT tags a LoRA adapter

DATA = "## Data"  # from here on, an adapter's card also describes a model that it is merged into

RESULTS, END_OF_RESULTS = "<!-- results -->", "<!-- /results -->"

# lm-eval's name of a metric: the hub's name and one for people
METRICS = {
    "acc": ("accuracy", "Accuracy"),
    "exact_match": ("exact_match", "Exact match"),
    "pass_at_1": ("pass@1", "Pass@1"),
}


_PLAIN_PROMPT = re.compile(r'= tokenizer\((".*?"), return_tensors')  # in an adapter's card


def model_card(run: Mapping[str, Any], echo_config: EchoConfig | None) -> str:
    """README.md of an adapter: how to use it, its data, results and training. run: the fields of `run.json`."""
    recipe, name = run["recipe"], Path(run["output"]).name
    base, is_packaged = recipe["model"], recipe["model"].startswith("packaged:")
    rows = recipe["data"]["train"]
    sources = [Path(one["file"]).name if one["file"] else one.get("hub") or one["task"] for one in rows]
    loss = run["final"].get("eval_loss")
    data = _metadata(
        base,
        library_name="peft",
        model_name=name,
        datasets=[one["hub"] for one in rows if one.get("hub")] or None,
        tags=[f"base_model:adapter:{base}"] * _is_hub_id(base) + TAGS + ["echo-lora"] * recipe["echo"],
        eval_results=None if loss is None else [_validation_loss(loss)],
    )
    body = (
        _templates()
        .get_template("model_card.md.j2")
        .render(
            **run,
            name=name,
            base_shown=_shown(base),
            sources=", ".join(sources),
            plain_prompt=alpaca_prompt("Your instruction") if run.get("is_alpaca") else "Your prompt",
            echo_config=None if echo_config is None else echo_config.to_dict(),
            method=METHODS.get(recipe["method"], recipe["method"]),
            notes=_init_text(recipe["lora"]),
            is_rewritten=_is_rewritten(recipe["lora"]),
            ratio=recipe["training"].get("loraplus_lr_ratio"),
            noise=recipe["training"].get("neftune_noise_alpha"),
            packaged=is_packaged,
            heading=DATA,
            results=_results_section([] if loss is None else [f"Loss on the validation rows: {loss:.4g}."]),
            shown=CARD_METRICS,
        )
    )
    return _card(data, body)


def _is_rewritten(lora: Mapping[str, Any]) -> bool:
    """Whether the adapter was saved as a LoRA of twice the rank; see `save_verified`."""
    return changes_base({"init_lora_weights": lora.get("init")}) is not None


def _init_text(lora: Mapping[str, Any]) -> str:
    init = lora.get("init", "default")
    text = "" if init == "default" else f", initialised by {init}"
    return text + (f"; saved as a LoRA of rank {2 * lora['r']} with the same effect" if _is_rewritten(lora) else "")


def merged_card(
    output: str | Path,
    base: str,
    adapter: str | Path,
    *,
    has_chat_template: bool,
    dtype: str,
    max_difference: float,
    largest_logit: float,
) -> str:
    """README.md of a merged model. What the adapter's card says of data, results, training and licence is kept."""
    given = _card_of(adapter)
    text, heading, rest = given.text.partition(f"{DATA}\n")
    stated: Any = given.data
    tags = [str(tag) for tag in stated.tags or []]
    kept = {key: getattr(stated, key, None) for key in ("license", "license_name", "license_link", "language")}
    data = _metadata(
        base,
        library_name="transformers",
        model_name=Path(output).name,
        datasets=stated.datasets,
        tags=[tag for tag in tags if tag not in TAGS and not tag.startswith("base_model:")],
        eval_results=stated.eval_results,
        **{key: value for key, value in kept.items() if value},
    )
    body = (
        _templates()
        .get_template("merged_card.md.j2")
        .render(
            name=Path(output).name,
            base_shown=_shown(base),
            adapter=Path(adapter).name if Path(adapter).name != "adapter" else Path(adapter).absolute().parent.name,
            is_chat="apply_chat_template" in text if heading else has_chat_template,
            plain_prompt=json.loads(prompt[1]) if (prompt := _PLAIN_PROMPT.search(text)) else "Your prompt",
            from_adapter=(heading + rest).strip(),
            dtype=dtype,
            max_difference=max_difference,
            largest_logit=largest_logit,
        )
    )
    return _card(data, body)


def with_scores(card: ModelCard, results: Sequence[Mapping[str, Any]]) -> str:
    """The card with these scores in its section of results and its metadata; all else stays as it is.

    results: the fields of a `TaskResult`, and `model`: "base" or "adapter". Scores given before are replaced.
    """
    scored = [result for result in results if result["model"] == "adapter"]
    data: Any = card.data
    losses_before = [one for one in data.eval_results or [] if one.metric_type == "loss"]
    data.model_name = data.model_name or "adapter"
    data.eval_results = losses_before + [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=result["task"],
            dataset_name=result["task"],
            dataset_split="test",
            metric_type=METRICS[result["metric"]][0],
            metric_name=METRICS[result["metric"]][1],
            metric_value=round(result["accuracy"], 4),
        )
        for result in scored
    ]
    lines = [f"Loss on the validation rows: {one.metric_value:.4g}." for one in losses_before]
    lines += [""] * bool(lines)
    lines += ["| task | model | metric | score | 95 % interval | rows |", "|---|---|---|---|---|---|"]
    for result in results:
        interval = f"{result['low']:.1%} to {result['high']:.1%}"
        cells = [result["task"], result["model"], METRICS[result["metric"]][1], f"{result['accuracy']:.1%}", interval]
        lines.append("| " + " | ".join([*map(_cell, cells), str(result["total"])]) + " |")
    section = re.compile(f"{re.escape(RESULTS)}.*?{re.escape(END_OF_RESULTS)}", re.DOTALL)
    text = section.sub(lambda match: _results_section(lines), card.text, count=1)
    return f"---\n{data.to_yaml()}\n---\n{text}"


def read_card(path: Path) -> ModelCard:
    """A model card, which people may have edited. Raises EchoCheckpointError if its metadata can't be read."""
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise EchoCheckpointError(
            f"{path} is not a model card whose metadata can be read: {error}. Correct the lines between the first two "
            "lines of ---, or remove the file."
        ) from error


def _card_of(adapter: str | Path) -> ModelCard:
    """The card in an adapter folder; an empty one where it is missing or, with a warning, can't be read."""
    path = Path(adapter) / CARD_FILE
    if path.is_file():
        try:
            return read_card(path)
        except EchoCheckpointError as error:  # it says nothing of the weights
            logger.warning("%s The merged model's card is written without it.", error)
    return ModelCard(_card(ModelCardData(), ""))


def _metadata(base: str, **fields: Any) -> ModelCardData:
    """Metadata with the base's hub id and licence, where they are known. A folder's path says nothing on the hub."""
    fields = (_license(base) if "license" not in fields else {}) | fields
    return ModelCardData(base_model=base if _is_hub_id(base) else None, pipeline_tag="text-generation", **fields)


def _license(base: str) -> dict[str, str]:
    """The licence that the base's own card states; empty if there is no card here. Nothing is downloaded."""
    if base.startswith("packaged:"):
        return {"license": LICENSE}
    path = try_to_load_from_cache(base, CARD_FILE) if _is_hub_id(base) else Path(base) / CARD_FILE
    if not isinstance(path, (str, Path)) or not Path(path).is_file():
        return {}
    try:
        stated = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):  # a card without metadata that can be read states none
        return {}
    names = ("license", "license_name", "license_link")
    return {name: str(stated[name]) for name in names if stated.get("license") and stated.get(name)}


def _validation_loss(value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type="validation",
        dataset_name="validation rows",
        dataset_split="validation",
        metric_type="loss",
        metric_name="Loss",
        metric_value=round(value, 4),
    )


def _results_section(lines: Sequence[str]) -> str:
    """Lines between the marks that `with_scores` looks for."""
    text = "\n".join(lines) or "Not scored yet: `echo-lora eval` adds its scores here."
    return f"{RESULTS}\n{text}\n{END_OF_RESULTS}"


def _is_hub_id(name: str) -> bool:
    """Whether a name, which is not that of a relative path, is one of the hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _shown(base: str) -> str:
    if _is_hub_id(base):
        return f"[{base}](https://huggingface.co/{base})"
    return f"`{base if base.startswith('packaged:') else Path(base).name}`"


def _card(data: ModelCardData, body: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _cell(text: str) -> str:
    """Text that can stand in a table of Markdown."""
    return text.replace("|", "\\|")


@cache
def _templates() -> Environment:
    environment = template_environment()
    environment.filters["json"] = json.dumps
    environment.filters["cell"] = _cell
    return environment
