"""The literal method, slow and obviously right: three passes over each row alone, nothing padded, nothing shared.

Written from the equations of docs/method.md. It imports nothing of the fast path and reads the parameters of the
echo networks by their names only. It is the only copy of the method beside the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

WITHOUT_EMBEDDING = ("rwkv", "mamba", "mamba2", "falcon_mamba")  # begin hidden_states with the output of layer 0


@dataclass
class OracleLosses:
    loss: Tensor
    ce_off: Tensor
    ce_on: Tensor
    distillation: Tensor
    z: Tensor
    ce_prompt: Tensor


def oracle_step(
    model: Any,
    rows: list[tuple[list[int], list[int]]],
    *,
    source_layers: list[int],
    config: Any,
    is_routed: bool = True,
    num_items: int | None = None,
    train_on_prompt: bool = False,
    answer_weight: float = 1.0,
    distillation_weight: float | None = None,
    together: bool = False,
) -> OracleLosses:
    """One step for rows of (token ids, labels), without padding; model is an EchoModel, used as a PEFT model.

    train_on_prompt: all tokens of a row but its first are trained on, those without a label in the echo-off pass only.
    together: pad the rows on the right and run them as one batch, where it is the batch's width that a model's
    numbers depend on.
    """
    groups = [rows] if together else [[row] for row in rows]
    terms = [_sums(model, group, source_layers, config, train_on_prompt) for group in groups]
    n = sum(count for *_, count in terms) if num_items is None else num_items
    ce_off, ce_on, kl, ce_prompt = (sum(values) / n for values in list(zip(*terms, strict=True))[:4])
    weight = config.distillation_weight if distillation_weight is None else distillation_weight
    loss = ce_prompt + answer_weight * ce_off
    if is_routed:
        of_off, of_on = ce_off + weight * kl, ce_on  # what trains the student, and what the teacher
        if config.distillation_direction == "off_to_on":
            of_off, of_on = ce_off, ce_on + weight * kl
        if config.echo_on_updates == "echo_only":
            of_on = _trains_only(of_on, list(model.echo.parameters()))
        loss = ce_prompt + answer_weight * config.routed_loss_scale * (of_off + of_on)
    return OracleLosses(loss, ce_off, ce_on, kl, torch.cat([z for *_, z, _ in terms]), ce_prompt)


def _trains_only(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The value, with its own gradient for these parameters, and none for any other."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    linear = sum((g * p).sum() for g, p in zip(gradients, parameters, strict=True) if g is not None)
    return linear + (value - linear).detach()


def _sums(
    model: Any, rows: list[tuple[list[int], list[int]]], source_layers: list[int], config: Any, train_on_prompt: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """CE(off), CE(on), divergence and CE(off) at prompt tokens, summed over tokens; z; the number of tokens."""
    base = model.get_base_model()
    B, T = len(rows), max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(B, T, dtype=torch.long)
    attention_mask = torch.zeros(B, T, dtype=torch.long)
    labels = torch.full((B, T), -100)
    for b, (ids, row_labels) in enumerate(rows):
        input_ids[b, : len(ids)] = torch.tensor(ids)
        attention_mask[b, : len(ids)] = 1
        labels[b, : len(ids)] = torch.tensor(row_labels)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}

    # pass 1, without gradient unless the echo is to carry it: z at the boundary
    boundary = [next(t for t, label in enumerate(row_labels) if label != -100) - 1 for _, row_labels in rows]
    with torch.set_grad_enabled(config.source_gradient):
        states = base(**inputs, output_hidden_states=True).hidden_states  # [s + 1]: output of layer s
    if base.config.model_type in WITHOUT_EMBEDDING:
        states = (None, *states)
    z_rows = []
    for b in range(B):
        mean = sum(states[s + 1][b, boundary[b]].float() for s in source_layers) / len(source_layers)
        if config.normalization == "layer":
            z_rows.append((mean - mean.mean()) / torch.sqrt(mean.var(unbiased=False) + 1e-5))
        else:
            seen = model.echo.standardize
            z_rows.append(((mean - seen.mean) / torch.sqrt(seen.variance + 1e-5)).clamp(-5, 5))
    z = torch.stack(z_rows)

    # pass 2: echo off
    off = base(**inputs).logits

    # pass 3: echo on, in full
    a = torch.zeros(B, T)
    for b in range(B):
        for t in range(T):
            if config.injection_mask == "predictive":
                a[b, t] = 1.0 if t + 1 < T and labels[b, t + 1] != -100 else 0.0
            else:
                a[b, t] = 1.0 if labels[b, t] != -100 else 0.0

    handles = []
    for key, branch in model.echo.branches.items():
        module = base.get_submodule(key.replace("/", "."))
        p = dict(branch.named_parameters())
        e = torch.tanh(z @ p["W1.weight"].T) @ p["W2.weight"].T
        g = 1 / (1 + torch.exp(-(torch.tanh(z @ p["U1.weight"].T) @ p["U2.weight"].T + p["U2.bias"])))
        delta = p["scale"] * g * e

        def add(x: Tensor, delta: Tensor = delta) -> Tensor:
            return x + (a[:, :, None] * delta[:, None, :]).to(x.dtype).reshape(x.shape)

        if config.injection_site == "lora_input":

            def before(_m: Any, args: Any, add: Any = add) -> Any:
                (x,) = args
                is_dora_identity = x.dim() == 2 and x.shape[0] == x.shape[1]  # the tests have B*T != width
                return None if is_dora_identity else (add(x),)

            handles.append(module.lora_A[model.echo_adapter].register_forward_pre_hook(before))
        else:
            handles.append(module.register_forward_hook(lambda _m, _args, out, add=add: add(out)))
    on = base(**inputs).logits
    for handle in handles:
        handle.remove()

    # losses, token by token, with the next-token shift
    ce_off, ce_on, kl, ce_prompt, count = *(off.new_zeros(()) for _ in range(4)), 0
    tau = config.distillation_temperature
    for b in range(B):
        for t in range(1, T):
            if labels[b, t] == -100:
                if train_on_prompt and t < len(rows[b][0]):
                    count += 1
                    ce_prompt = ce_prompt - F.log_softmax(off[b, t - 1].float(), -1)[input_ids[b, t]]
                continue
            count += 1
            q_off, q_on = off[b, t - 1].float(), on[b, t - 1].float()
            ce_off = ce_off - F.log_softmax(q_off, -1)[labels[b, t]]
            ce_on = ce_on - F.log_softmax(q_on, -1)[labels[b, t]]
            teacher, student = (q_on, q_off) if config.distillation_direction == "on_to_off" else (q_off, q_on)
            is_better = F.softmax(teacher, -1)[labels[b, t]] > F.softmax(student, -1)[labels[b, t]]
            if config.distillation_tokens == "teacher_better" and not is_better:
                continue
            teacher, student = teacher.detach().double(), student.double()  # a small divergence drowns in float32
            p_teacher = F.softmax(teacher / tau, -1)
            kl = kl + tau**2 * (p_teacher * (p_teacher.log() - F.log_softmax(student / tau, -1))).sum().float()
    return ce_off, ce_on, kl, ce_prompt, z, count
