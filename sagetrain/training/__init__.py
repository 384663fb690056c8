"""Training with Lightning: strategies, the module around a Hugging Face model, callbacks, the run."""
