"""The client: Flower's template, with a mod and a guard."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_cifar10.task import accuracy, load_data, make_model, protected, train
from vitguard.federated.flower import ProtectMod, attach, encryptor, masker

app = ClientApp(mods=[ProtectMod()])


@app.train()
def train_model(message: Message, context: Context) -> Message:
    """Train on the client's own data; ProtectMod seals the reply."""
    model = make_model()
    sealing = masker if context.run_config["variant"] == "masks" else encryptor
    guard = attach(protected(model, context.run_config, sealing))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader, _ = load_data(int(context.node_config["partition-id"]))
    examples = len(loader.dataset)
    loss = train(model, guard, loader, context.run_config)
    metrics = MetricRecord({"loss": loss, "num-examples": examples})
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
    return Message(content=RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate_model(message: Message, context: Context) -> Message:
    """Evaluate the model on the client's own data."""
    model = make_model()
    protected(model, context.run_config)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, loader = load_data(int(context.node_config["partition-id"]))
    metrics = {"accuracy": accuracy(model, loader), "num-examples": len(loader.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)
