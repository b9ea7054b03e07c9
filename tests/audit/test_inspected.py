"""An audit of a server that crafts weights, and of a client that refuses them."""

import torch

import vitguard as vg


def test_a_client_that_inspects_leaves_a_malicious_server_nothing_to_attack(small_vit):
    model = small_vit(img_size=16, embed_dim=48)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    report = vg.audit(
        model,
        (images, torch.zeros(1).long()),
        defenses={"inspected": "inspect"},
        attacks=["imprint"],
        threat=vg.MaliciousServer("imprint:gated=false"),
    )
    (found,) = [f for f in report.findings if f.defense == "inspected"]
    assert found.verdict == "blocked"
    assert "the client refuses: Expected weights without signs" in found.reason
