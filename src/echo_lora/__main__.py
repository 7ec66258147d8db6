"""`python -m echo_lora`, which is how `accelerate launch -m echo_lora` starts it."""

from echo_lora.cli import main

if __name__ == "__main__":
    main()
