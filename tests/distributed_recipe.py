"""One process of `echo-lora train`: `distributed_recipe.py train RECIPE …`, which also runs FSDP2 on CPUs."""

from __future__ import annotations

from typing import Any

import echo_lora.recipe.train as recipe_train
from distributed_run import prepared
from echo_lora.cli import main

if __name__ == "__main__":
    make_arguments = recipe_train.training_arguments

    def training_arguments(*args: Any) -> Any:
        return prepared(make_arguments(*args))

    recipe_train.training_arguments = training_arguments
    main()
