"""The server: Flower's template, with another strategy."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_cifar10.task import make_model, protected
from vitguard.federated.flower import (
    EncryptedFedAvg,
    Federation,
    MaskedFedAvg,
    MaskedFederation,
)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds. Under encryption the server never sees the model after the first one."""
    model = make_model()
    protected(model, context.run_config)
    if context.run_config["variant"] == "encrypted":
        strategy = EncryptedFedAvg(Federation.from_environment())
    elif context.run_config["variant"] == "masks":
        strategy = MaskedFedAvg(MaskedFederation.from_environment())
    else:
        strategy = FedAvg()
    rounds = int(context.run_config["num-server-rounds"])
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)
