"""Messages of masked aggregation: changed by strangers, and signed by who made them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from fuzzing.mutations import Chance, Fault
from vitguard.defenses.encryption import Manifest, SigningKey
from vitguard.defenses.masking import MaskingClient, MaskingServer, SumOpener, Terms
from vitguard.errors import VitguardError

__all__ = ["Masked"]

ROLES = {
    "keys": "add_keys", "shares": "add_shares", "values": "add_masked",
    "agreement": "add_agreement", "answers": "add_answer",
}  # fmt: skip
_PROOF = 64
_HEAD = 39  # bytes before the sender's name


class Masked:
    """One round of three clients, whose server is stopped before each phase."""

    def __init__(self, folder: Path) -> None:
        self.signing = SigningKey.generate()
        self.identities = {c: SigningKey.generate() for c in "abc"}
        manifest = Manifest.of({"w": torch.zeros(4)}, bounds=1.0)
        public = {c: k.public_bytes() for c, k in self.identities.items()}
        self.terms = Terms(manifest, public, self.signing.public_bytes())
        self.messages: dict[str, dict[str, bytes]] = {phase: {} for phase in ROLES}
        self.lists: list[bytes] = []
        self.play(record=True)

    def play(self, until: str = "", *, record: bool = False) -> MaskingServer:
        """Play the round again from the recorded messages; return the server before a phase."""
        server = MaskingServer(self.terms, signing=self.signing, round_id=1)
        clients = {}
        if record:
            clients = {
                c: MaskingClient(self.terms, k, client_id=c) for c, k in self.identities.items()
            }
        closes = {
            "keys": server.roster, "shares": lambda: server.inbox("a"),
            "values": server.survivors, "agreement": server.agreements, "answers": server.finish,
        }  # fmt: skip
        told = b""
        for phase, role in ROLES.items():
            if phase == until:
                return server
            for name, client in clients.items():
                self.messages[phase][name] = self.said(phase, client, told, server)
            for message in self.messages[phase].values():
                getattr(server, role)(message)
            told = closes[phase]()
            if record:
                self.lists.append(told)
        return server

    @staticmethod
    def said(phase: str, client: MaskingClient, told: bytes, server: MaskingServer) -> bytes:
        """What an honest client answers to what the server told it."""
        if phase == "keys":
            return client.start_round(1)
        if phase == "values":
            client.take_shares(server.inbox(client.client_id))
            return client.mask({"w": torch.tensor([0.5, -0.5, 0.25, 0.0])})
        act = {"shares": client.share_keys, "agreement": client.agree, "answers": client.answer}
        return act[phase](told)

    def given(self, chance: Chance, *, signed: bool) -> str:
        """Give a changed message of one client to the server at its phase, in place of the true."""
        phase, name = chance.choice(list(ROLES)), chance.choice("abc")
        true = self.messages[phase][name]
        if signed:
            data = self.forged(chance, true, name)
        else:
            donors = [m for found in self.messages.values() for m in found.values()]
            data = chance.flip(true, donors)
        honest = {m for found in self.messages.values() for m in found.values()}
        if data in honest:
            return "same"
        server = self.play(phase)
        before = server._total.copy()
        try:
            getattr(server, ROLES[phase])(data)
        except VitguardError:
            if (server._total != before).any() or server.clients != self.play(phase).clients:
                raise Fault("a refused message changed the sum") from None
            return "refused"
        if not signed:
            raise Fault(f"a changed message was taken in the phase of {phase}")
        return "other"  # what an insider says of itself

    def forged(self, chance: Chance, true: bytes, name: str) -> bytes:
        """Change the body, or any byte, and sign it with the client's own key."""
        start = _HEAD + len(name)
        head, body = true[:start], true[start:-_PROOF]
        if body[:1] == b"{" and chance.random() < 0.8:
            body = chance.json(json.loads(body)).encode("utf-8", "surrogatepass")
            content = head + body
        else:
            content = chance.flip(head + body, [head + body])
        return content + self.identities[name].sign(hashlib.sha256(content).digest())

    def outsider(self, chance: Chance) -> str:
        """A message changed by somebody without a key."""
        return self.given(chance, signed=False)

    def insider(self, chance: Chance) -> str:
        """A message changed and signed by the client that sends it."""
        return self.given(chance, signed=True)

    def told(self, chance: Chance) -> str:
        """A sum, or what the server tells clients, changed on its way."""
        true = chance.choice(self.lists)
        data = chance.flip(true, self.lists)
        if data in self.lists:
            return "same"
        opener = SumOpener(self.terms)
        client = MaskingClient(self.terms, self.identities["a"], client_id="a")
        client.start_round(1)
        for act in (client.share_keys, lambda d: opener.open(d, round_id=1)):
            try:
                act(data)
            except VitguardError:
                continue
            raise Fault("what the server did not sign was taken")
        if opener.opened != -1:
            raise Fault("a forged sum used up its round")
        return "refused"

    def close(self) -> None:
        """Play the honest round once more: it still gives its mean."""
        mean = self.play().mean()["w"]
        if float((mean - torch.tensor([0.5, -0.5, 0.25, 0.0])).abs().max()) > 1e-6:
            raise Fault("the honest sum changed")
