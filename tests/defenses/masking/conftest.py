import pytest
import torch

from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import MaskingClient, MaskingServer, SumOpener, Terms

BASE = "v1"


class Run:
    """A small masked run: keys of everybody, and helpers that drive one round."""

    def __init__(self, count=5, values=300, threshold=0, max_weight=4.0):
        self.signing = SigningKey.generate()
        self.names = [f"client-{n}" for n in range(count)]
        self.identities = {c: SigningKey.generate() for c in self.names}
        template = {"w": torch.zeros(values), "b": torch.zeros(3, 2)}
        self.template = template
        self.manifest = Manifest.of(template, bounds=1.0, max_weight=max_weight)
        public = {c: k.public_bytes() for c, k in self.identities.items()}
        self.terms = Terms(self.manifest, public, self.signing.public_bytes(), threshold)
        self.weights = {c: 1.0 + n % 3 for n, c in enumerate(self.names)}

    def client(self, name, **options):
        return MaskingClient(self.terms, self.identities[name], client_id=name, **options)

    def server(self, round_id=5):
        return MaskingServer(self.terms, signing=self.signing, round_id=round_id, base=BASE)

    def opener(self, **options):
        return SumOpener(self.terms, **options)

    def update(self, name):
        generator = torch.Generator().manual_seed(self.names.index(name))
        return {
            k: torch.rand(t.shape, generator=generator) * 2 - 1 for k, t in self.template.items()
        }

    def drive(self, until="sum", dropouts=None, round_id=5, change=None):
        """Play a round; `dropouts` maps a phase to clients that are silent from it on."""
        dropouts = dropouts or {}
        change = change or (lambda phase, name, message: message)
        clients = {c: self.client(c) for c in self.names}
        server, gone = self.server(round_id), set()

        def phase(label, act, add):
            gone.update(dropouts.get(label, ()))
            for name, client in clients.items():
                if name not in gone:
                    add(change(label, name, act(name, client)))

        def start(name, client):
            return client.start_round(round_id, weight=self.weights[name], base=BASE)

        phase("keys", start, server.add_keys)
        if until == "keys":
            return clients, server
        roster = server.roster()
        phase("shares", lambda _, client: client.share_keys(roster), server.add_shares)
        if until == "shares":
            return clients, server
        for name, client in clients.items():
            if name not in gone:
                client.take_shares(server.inbox(name))
        if until == "inbox":
            return clients, server
        phase("values", lambda name, client: client.mask(self.update(name)), server.add_masked)
        if until == "values":
            return clients, server
        survivors = server.survivors()
        phase("agreement", lambda _, client: client.agree(survivors), server.add_agreement)
        if until == "agreement":
            return clients, server
        agreements = server.agreements()
        phase("answers", lambda _, client: client.answer(agreements), server.add_answer)
        return clients, server

    def plain_mean(self, names):
        total = sum(self.weights[c] for c in names)
        return {
            k: sum(self.weights[c] * self.update(c)[k].double() for c in names) / total
            for k in self.template
        }

    def step(self, names):
        """The largest error of an average: one level of each client."""
        total = sum(self.weights[c] for c in names)
        return len(names) / self.terms.levels * self.manifest.max_weight / total + 1e-6


@pytest.fixture
def make_run():
    return Run
