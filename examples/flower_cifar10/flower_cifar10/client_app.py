"""The client: Flower's template, with a mod and a guard."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import vitguard as vg
from flower_cifar10.task import load_data, make_model, protected, train
from vitguard.federated.flower import ProtectMod, attach, encryptor

app = ClientApp(mods=[ProtectMod()])


def defense(config):
    """Return what protects the update: client-level privacy, or encryption."""
    if config["privacy"]:
        return vg.ClientPrivacy(epsilon=8.0, rounds=int(config["num-server-rounds"]))
    return vg.EncryptedGradients(encryptor=encryptor())


@app.train()
def train_model(message: Message, context: Context) -> Message:
    """Train on the client's own data; ProtectMod seals the reply."""
    model = make_model()
    attach(protected(model, defense(context.run_config)))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    loader = load_data(int(context.node_config["partition-id"]))
    epochs, lr = context.run_config["local-epochs"], context.run_config["lr"]
    loss = train(model, loader, int(epochs), float(lr))
    metrics = MetricRecord({"loss": loss, "num-examples": len(loader.dataset)})
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
    return Message(content=RecordDict(content), reply_to=message)
