"""The smallest model that has every part: overrides of conf/model/quickstart.yaml for tests that really train."""

MODEL = (
    "model.config.hidden_size=64",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=1",
    "model.config.num_key_value_heads=1",
)
