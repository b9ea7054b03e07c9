"""NVFlare: filters that seal and open, a server that adds ciphertext, a recipe of it all."""

from vitguard.errors import missing_extra

try:
    import nvflare.app_opt.pt.recipes.fedavg  # noqa: F401 - releases before 2.7 have none
except ImportError as error:
    raise missing_extra("vitguard.federated.nvflare", "nvflare", "nvflare") from error

from vitguard.federated.nvflare.client import OpenFilter, SealFilter
from vitguard.federated.nvflare.inspecting import InspectFilter
from vitguard.federated.nvflare.recipe import encrypted_fedavg
from vitguard.federated.nvflare.server import EncryptedAggregator, SumPersistor

__all__ = [
    "EncryptedAggregator",
    "InspectFilter",
    "OpenFilter",
    "SealFilter",
    "SumPersistor",
    "encrypted_fedavg",
]
