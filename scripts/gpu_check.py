"""Check the step and time it on a CUDA machine, from a checkout and without network.

    python scripts/gpu_check.py --minutes 8        # call it until it says that nothing is left

parity    losses and gradients against the literal method of tests/oracle.py, per attention, dtype and checkpointing
waits     nothing reads a value from the device between the first layer and the end of backward
compiled  compiled layers give the losses and gradients of uncompiled ones
steps     seconds and memory of TRL's LoRA and DoRA, our LoRA step and the echo, on random weights in the true shape of
          SmolLM2-135M, LLaMA-7B and Llama-3-8B, and on rows of several shapes
second    what the echo-on pass costs: kernels and time on the device; the rest of a step's time is launching them

Every piece is written to OUTPUT/gpu_check.json when it is done, so that an interruption loses one piece; a piece that
fails is kept with its error, and tried again with --retry. OUTPUT/gpu_check.md is the table. --tiny: small sizes, on
any device, to test the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, models  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from architectures import ARCHITECTURES, collate, random_row, tiny_echo_model  # noqa: E402
from echo_lora.bench.programs import VARIANTS, Batch, Case, Program  # noqa: E402
from echo_lora.data.tokenize import TokenizedRow  # noqa: E402
from echo_lora.environment import commit, devices, processor, versions  # noqa: E402
from echo_lora.files import write_text  # noqa: E402
from echo_lora.recipe.load import load_recipe  # noqa: E402
from oracle import oracle_step  # noqa: E402

ARCHITECTURES["llama"][1]["head_dim"] = 16  # the least that flex attention takes
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = {
    "SmolLM2-135M": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "LLaMA-7B": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "Llama-3-8B": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    },
}  # fmt: skip
TINY_MODELS = {
    "tiny": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4
    }
}  # fmt: skip
SHAPES = {(96, 8): 16, (256, 32): 16, (64, 192): 16, (512, 64): 8}  # prompt and answer tokens: rows
TINY_SHAPES = {(12, 4): 2}
LORA = ("lora.r=32", "lora.alpha=64", "lora.target_modules=[q_proj,k_proj,v_proj,up_proj,down_proj]")
ROUNDS = 7
BOUNDS = {"float32": 1e-5, "bfloat16": 3e-2}  # relative error of losses and of the gradient as one vector


# ------------------------------------------------------------------- parity


def parity(attention: str, dtype: str, is_checkpointed: bool) -> dict[str, Any]:
    """Relative errors of the step on the device to the literal method on the CPU in float32."""
    generator = torch.Generator().manual_seed(0)
    rows = [random_row(generator, prompt, answer) for prompt, answer in ((9, 4), (5, 7), (12, 2))]
    model = tiny_echo_model()
    oracle = oracle_step(model, rows, source_layers=[1, 2], config=model.echo_config)
    oracle.loss.backward()
    expected = _gradient(model)
    model = tiny_echo_model(attention=attention).to(DEVICE, getattr(torch, dtype))
    model.echo.float()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.float()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    output = model(**{key: value.to(DEVICE) for key, value in collate(rows).items()})
    output.loss.backward()
    names = ("loss", "ce_off", "ce_on", "distillation")
    errors = {name: _error(output[name], getattr(oracle, name)) for name in names}
    # a divergence grows with the square of the passes' difference, which has the rounding error of the logits
    rounding = 1e-7 * model.echo_config.distillation_temperature**2
    gap = (output.distillation.double().cpu() - oracle.distillation.double()).abs().item()
    errors["distillation"] = max(gap - rounding, 0.0) / oracle.distillation.item()
    errors["gradient"] = _error(_gradient(model), expected)
    why = model.why_full(DEVICE)
    # a distillation near zero is a difference of near-equal numbers, which bfloat16 does not hold
    bounded = [value for name, value in errors.items() if name != "distillation" or dtype == "float32"]
    return {"errors": errors, "second pass in full because": why, "passes": max(bounded) <= BOUNDS[dtype]}


def _gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])


def _error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return ((ours - theirs).norm() / theirs.norm()).item()


def waits() -> dict[str, Any]:
    """An error if a step reads a value from the device after its first layer has begun."""
    if DEVICE.type != "cuda":
        return {"passes": True, "note": "needs CUDA"}
    model = tiny_echo_model().to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    rows = [random_row(generator, prompt, answer) for prompt, answer in ((9, 4), (5, 7))]
    batch = {key: value.to(DEVICE) for key, value in collate(rows).items()}
    model(**batch).loss.backward()  # tried, and warm
    layer = model.get_base_model().model.layers[0]
    handle = layer.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    try:
        model(**batch, num_items_in_batch=torch.tensor(11, device=DEVICE)).loss.backward()
        return {"passes": True}
    finally:
        torch.cuda.set_sync_debug_mode("default")
        handle.remove()


def compiled() -> dict[str, Any]:
    """Relative errors of compiled layers to uncompiled ones; with checkpointing they are refused."""
    generator = torch.Generator().manual_seed(0)
    rows = [random_row(generator, prompt, answer) for prompt, answer in ((9, 4), (5, 7))]
    batch = {key: value.to(DEVICE) for key, value in collate(rows).items()}
    results = []
    for is_compiled in (False, True):
        model = tiny_echo_model().to(DEVICE)
        if is_compiled:
            _compile_layers(model)
        output = model(**batch)
        output.loss.backward()
        results.append((output.loss, _gradient(model)))
    errors = {n: _error(ours, theirs) for n, theirs, ours in zip(("loss", "gradient"), *results, strict=True)}
    return {"errors": errors, "passes": max(errors.values()) <= 1e-4}


def _compile_layers(model: Any) -> None:
    torch._dynamo.reset()
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else each layer's number compiles anew
    for layer in model.get_base_model().model.layers:
        layer.compile()


# -------------------------------------------------------------------- steps


def base_of(shape: dict[str, Any]) -> LlamaForCausalLM:
    """Random weights on the device, in bfloat16 on a GPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    try:
        with torch.device(DEVICE):
            return LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Enough of a tokenizer for the trainers, which only pad."""
    words = {f"t{index}": index for index in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t1", eos_token="t2", unk_token="t0")


def batch_of(vocabulary: int, prompt: int, answer: int, rows: int) -> Batch:
    ids = np.random.default_rng(0).integers(3, vocabulary, size=(rows, prompt + answer))
    ids[:, -1] = 2  # the end of an answer
    return Batch(f"{prompt}x{answer}", [TokenizedRow(row, [-100] * prompt + row[prompt:]) for row in ids.tolist()])


def steps(base: Callable[[], Any], prompt: int, answer: int, rows: int, cases: list[Case]) -> dict[str, Any]:
    """Seconds of each case in turns, and the peak of its memory."""
    model = base()
    batch = batch_of(model.config.vocab_size, prompt, answer, rows)
    recipe, tokenizer = load_recipe("tiny", [*LORA, "training.batch_size=8"]), tokenizer_of(model.config.vocab_size)
    found: dict[str, Any] = {"rows": rows, "tokens": rows * (prompt + answer), "cases": {}}
    programs: dict[Case, tuple[Program, Any]] = {}
    with ExitStack() as stack:
        for case in cases:
            others = _allocated() - sum(p.numel() * p.element_size() for p in model.parameters())
            try:
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
                program = Program(case, recipe, model, tokenizer, batch, scratch)
                inputs = program.inputs_of(batch)
                for _ in range(2):
                    program.step(*inputs)
                _reset_peak()
                program.step(*inputs)
                found["cases"][str(case)] = {"seconds": [], **_peak(others)}
                programs[case] = program, inputs
            except torch.OutOfMemoryError as error:
                found["cases"][str(case)] = {"error": str(error).split(". ")[0]}
                _free()
        for turn in range(ROUNDS):
            order = list(programs)
            np.random.default_rng(turn).shuffle(order)  # type: ignore[arg-type]
            for case in order:
                program, inputs = programs[case]
                start = time.perf_counter()
                program.step(*inputs)  # until the device is done
                found["cases"][str(case)]["seconds"].append(time.perf_counter() - start)
    return found


def second(base: Callable[[], Any], prompt: int, answer: int, rows: int) -> dict[str, Any]:
    """Kernels and device time of a step with and without the echo-on pass; the rest of its time is launching."""
    model = base()
    batch = batch_of(model.config.vocab_size, prompt, answer, rows)
    recipe, tokenizer = load_recipe("tiny", [*LORA, "training.batch_size=8"]), tokenizer_of(model.config.vocab_size)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE.type == "cuda" else [])]
    found: dict[str, Any] = {"rows": rows}
    for variant in ("lora", "echo"):
        with tempfile.TemporaryDirectory() as scratch:
            program = Program(Case(variant, False), recipe, model, tokenizer, batch, scratch)
            inputs = program.inputs_of(batch)
            for _ in range(3):
                program.step(*inputs)
            seconds = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                program.step(*inputs)
                seconds.append(time.perf_counter() - start)
            with profile(activities=activities) as profiler:
                program.step(*inputs)
        kernels = [e for e in profiler.key_averages() if e.device_type != torch.autograd.DeviceType.CPU]
        found[variant] = {
            "milliseconds": 1e3 * statistics.median(seconds),
            "device_milliseconds": sum(e.self_device_time_total for e in kernels) / 1e3,
            "kernels": sum(e.count for e in kernels),
        }
        del program
        _free()
    return found


def _reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _allocated() -> int:
    return torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0


def _peak(others: int) -> dict[str, float]:
    """Peak of allocated memory, without that of other programs on the same base."""
    return {"peak_gib": (torch.cuda.max_memory_allocated() - others) / 2**30} if DEVICE.type == "cuda" else {}


def _free() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------- pieces


class Bases:
    """The base model in use; a piece for another one frees it."""

    def __init__(self) -> None:
        self.name, self.model = "", None

    def __call__(self, name: str, shape: dict[str, Any]) -> Any:
        if name != self.name:
            self.name, self.model = name, None
            _free()
            self.model = base_of(shape)
        return self.model


def pieces(is_tiny: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """All pieces by name, the most wanted first."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    # flex attention has no backward pass on a CPU
    for attention in ("eager", "sdpa", *(["flex_attention"] if DEVICE.type == "cuda" else [])):
        for dtype in BOUNDS:
            for is_checkpointed in (False, True):
                name = f"parity {attention} {dtype} checkpointing {'on' if is_checkpointed else 'off'}"
                found[name] = partial(parity, attention, dtype, is_checkpointed)
    found["waits"] = waits
    bases, shapes = Bases(), TINY_SHAPES if is_tiny else SHAPES
    ((short_prompt, short_answer), short_rows), *_ = shapes.items()
    *_, ((long_prompt, long_answer), long_rows) = shapes.items()
    for model, shape in (TINY_MODELS if is_tiny else MODELS).items():
        base = partial(bases, model, shape)
        for (prompt, answer), rows in shapes.items():
            lora = [Case(variant, False) for variant in ("trl_lora", "lora", "echo")]
            found[f"steps {model} {prompt}x{answer}"] = partial(steps, base, prompt, answer, rows, lora)
        short = f"{model} {short_prompt}x{short_answer}"
        dora = [Case(variant, False) for variant in ("trl_dora", "echo_dora")]
        found[f"steps {short} DoRA"] = partial(steps, base, short_prompt, short_answer, short_rows, dora)
        saved = [Case(variant, True) for variant in ("trl_lora", "lora", "echo")]
        name = f"steps {model} {long_prompt}x{long_answer} checkpointing"
        found[name] = partial(steps, base, long_prompt, long_answer, long_rows, saved)
        found[f"second {short}"] = partial(second, base, short_prompt, short_answer, short_rows)
    return found | {"compiled": compiled}


def machine() -> dict[str, Any]:
    driver = ""
    if DEVICE.type == "cuda":
        path = Path("/proc/driver/nvidia/version")
        driver = path.read_text().splitlines()[0] if path.is_file() else ""
    return {
        "devices": devices(), "processor": processor(), "driver": driver, "cuda": torch.version.cuda,
        "versions": versions(), "commit": commit(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--minutes", type=float, default=8, help="start no piece after this time")
    parser.add_argument("--only", default="", help="pieces whose name contains this")
    parser.add_argument("--retry", action="store_true", help="try pieces again that failed")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test the script")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "gpu_check.json"
    record = json.loads(path.read_text()) if path.is_file() else {"machine": machine(), "pieces": {}}
    if record["machine"] != json.loads(json.dumps(machine())):
        sys.exit(f"{path} is of another machine, version or commit. Choose another --output.")
    start, left = time.monotonic(), []
    for name, piece in pieces(args.tiny).items():
        done = record["pieces"].get(name)
        if args.only not in name or (done is not None and not (args.retry and "error" in done)):
            continue
        if time.monotonic() - start > 60 * args.minutes:
            left.append(name)
            continue
        begun = time.monotonic()
        try:
            result = piece()
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"[:2000]}
        _free()
        record["pieces"][name] = result | {"took": round(time.monotonic() - begun, 1)}
        write_text(path, json.dumps(record, indent=1) + "\n")
        write_text(args.output / "gpu_check.md", page(record))
        print(f"{name}: {result.get('error') or result.get('passes', 'measured')}", flush=True)
    print(f"{len(left)} pieces are left. Call it again." if left else "Nothing is left.")
    failed = [n for n, piece in record["pieces"].items() if "error" in piece or piece.get("passes") is False]
    if failed:
        sys.exit(f"{len(failed)} pieces failed: {', '.join(failed)}")


# --------------------------------------------------------------------- page


def page(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    about = record["machine"]
    shown = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    lines = [
        "# The step on a GPU", "",
        f"`python scripts/gpu_check.py`, commit {about['commit']}. {', '.join(about['devices'])}; "
        f"{about['processor']}; {about['driver']}. {shown}.", "",
        "| check | result | largest relative error |", "|---|---|---|",
    ]  # fmt: skip
    for name, piece in record["pieces"].items():
        if name.split()[0] in ("parity", "waits", "compiled"):
            errors = piece.get("errors", {})
            worst = max(errors, key=errors.get, default="")
            error = f"{errors[worst]:.1e} ({worst})" if errors else ""
            outcome = _first_line(piece.get("error")) or ("passes" if piece["passes"] else "fails")
            lines.append(f"| {name} | {outcome} | {error} |")
    lines += [
        "", "Steps: median and fastest milliseconds, tokens per second by the median, peak of allocated memory, and "
        "the median ratio of paired steps to our LoRA step.", "",
        "| model, shape | rows | step | median | fastest | tokens/s | GiB | to our LoRA step |",
        "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, piece in record["pieces"].items():
        if name.startswith("steps "):
            lines += _step_lines(name.removeprefix("steps "), piece)
    lines += [
        "", "The echo-on pass: kernels and time on the device of one step, beside its whole time.", "",
        "| model, shape | step | kernels | device ms | step ms |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, piece in record["pieces"].items():
        if name.startswith("second "):
            for step, value in piece.items():
                if isinstance(value, dict):
                    lines.append(
                        f"| {name.removeprefix('second ')} | {step} | {value['kernels']} | "
                        f"{value['device_milliseconds']:.0f} | {value['milliseconds']:.0f} |"
                    )
            if "error" in piece:
                lines.append(f"| {name.removeprefix('second ')} | {_first_line(piece['error'])} | | | |")
    return "\n".join(lines) + "\n"


def _first_line(error: str | None) -> str:
    return (error or "").split("\n")[0][:200]


def _step_lines(name: str, piece: dict[str, Any]) -> list[str]:
    if "error" in piece:
        return [f"| {name} | | {_first_line(piece['error'])} | | | | | |"]
    lines = []
    lora = next((v.get("seconds") for case, v in piece["cases"].items() if case.startswith("lora,")), None)
    for case, value in piece["cases"].items():
        if "error" in value:
            lines.append(f"| {name} | {piece['rows']} | {case} | {value['error']} | | | | |")
            continue
        seconds = value["seconds"]
        median = statistics.median(seconds)
        ratio = f"{statistics.median(a / b for a, b in zip(seconds, lora, strict=True)):.2f}" if lora else ""
        memory = f"{value['peak_gib']:.1f}" if "peak_gib" in value else ""
        lines.append(
            f"| {name} | {piece['rows']} | {case} | {1e3 * median:.0f} | {1e3 * min(seconds):.0f} | "
            f"{math.floor(piece['tokens'] / median)} | {memory} | {ratio} |"
        )
    return lines


assert set(VARIANTS) >= {"trl_lora", "lora", "echo", "trl_dora", "echo_dora"}

if __name__ == "__main__":
    main()
