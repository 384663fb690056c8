"""The smallest model that has every part, and a run of it: overrides for tests that really train."""

MODEL = (
    "model.config.hidden_size=64",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=1",
    "model.config.num_key_value_heads=1",
)

# Two steps on the CPU, in FP32, in the arm bf16; a later override of the same key wins. ARMS: for a comparison.
RUN = (
    "recipe=quickstart",
    "compare.arms=null",
    "attention=bf16",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    *MODEL,
    "data.seq_len=32",
    "data.batch_size=2",
    "trainer.max_steps=2",
)
ARMS = (*(word for word in RUN if not word.startswith(("attention=", "compare."))), "compare.arms=[bf16,sage_int8]")
