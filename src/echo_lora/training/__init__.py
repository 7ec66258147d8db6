"""The trainers: Trainer and SFTTrainer with the echo loss, their checkpoints and metrics, and unsupported settings."""
