"""Training with Lightning: the module around a Hugging Face model, callbacks, checkpoints, the run."""
