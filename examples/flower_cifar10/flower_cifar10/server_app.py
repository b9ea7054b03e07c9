"""The server: Flower's template, with another strategy."""

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from flower_cifar10.task import make_model, protected
from vitguard.federated.flower import EncryptedFedAvg, Federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds. The server never sees the model after the first one."""
    model = make_model()
    protected(model)
    if context.run_config["privacy"]:
        strategy = FedAvg(fraction_evaluate=0.0)
    else:
        strategy = EncryptedFedAvg(Federation.from_environment(), fraction_evaluate=0.0)
    rounds = int(context.run_config["num-server-rounds"])
    strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds)
