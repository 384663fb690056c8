"""The strategies by their former name (now `sagetrain.integrations.lightning`), for programs that import them here."""

from sagetrain.integrations.lightning import SageDDPStrategy, SageDeepSpeedStrategy, SageFSDP2Strategy, shard

__all__ = ["SageDDPStrategy", "SageDeepSpeedStrategy", "SageFSDP2Strategy", "shard"]
