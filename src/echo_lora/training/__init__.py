"""The trainers: the echo loss in Trainer and SFTTrainer, checkpoints, metrics, and what is refused."""
