"""Several processes of one run, as `accelerate launch` and torchrun start them: what the first does for all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import distributed

from echo_lora.environment import process_count
from echo_lora.errors import EchoError


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes of this launch, and leave them at the end; does nothing in a process of its own.

    After an error the processes are left without a goodbye, because the others may wait for this one elsewhere: the
    launcher ends them.
    """
    if process_count() == 1 or distributed.is_initialized():
        yield
        return
    PartialState(cpu=not torch.accelerator.is_available())
    yield
    PartialState().destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Wait for all processes at the end; an EchoError in one is raised in all, so that none waits for another forever.

    Only the process that it happened in reports it; elsewhere `is_repeated` is set. For work without communication.
    """
    if process_count() == 1:
        yield
        return
    error = None
    try:
        yield
    except EchoError as raised:
        error = raised
    errors = gather_object([error])
    first = next((index for index, found in enumerate(errors) if found is not None), None)
    if first is None:
        return
    if first == PartialState().process_index:
        assert error is not None
        raise error
    repeated = copy.copy(errors[first])
    repeated.is_repeated = True
    raise repeated
