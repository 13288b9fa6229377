"""One decoder for every model, its dimensions, and Hugging Face checkpoints in and out."""
