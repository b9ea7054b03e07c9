"""What a guarantee allows any attack, beside what the attacks of an audit did."""

import functools
import io
import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from scipy.stats import norm

from tests.defenses.privacy.privacy_models import build
from vitguard.attacks.base import Attack
from vitguard.audit import LocalTraining, audit
from vitguard.core import Guess, Normalization
from vitguard.defenses.noise import GradientNoise
from vitguard.defenses.positions import FixedPositions
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy

PRIOR = 0.05  # what a blind guess has among 100 decoys, crowding counted


@dataclass(frozen=True)
class Grey(Attack):
    name: ClassVar[str] = "grey"
    family: ClassVar[str] = "closed-form"

    def run(self, view, generator):
        return Guess(torch.full((view.update.batch_size, *view.image_shape), 0.5))


STACKS = {
    "records": [DifferentialPrivacy(noise=1.1, clip=0.5)],
    "client": [ClientPrivacy(noise=2.0)],
    "both": [DifferentialPrivacy(noise=1.0), ClientPrivacy(noise=4.0)],
    "no noise": [DifferentialPrivacy(noise=0.0)],
    "no noise, client": [ClientPrivacy(noise=0.0)],
    "baseline": [GradientNoise(0.1)],
    "positions": [FixedPositions("frozen")],
}


@functools.cache
def report(**training):
    torch.manual_seed(0)
    return audit(
        build("vit", torch.float32),
        (torch.rand(2, 3, 32, 32), torch.tensor([0, 1])),
        defenses=STACKS,
        attacks=[Grey()],
        normalization=Normalization((0.5,) * 3, (0.5,) * 3),
        training=LocalTraining(**training) if training else None,
    )


def finding_of(stack, **training):
    return next(f for f in report(**training).findings if f.defense == stack)


def details_of(stack, **training):
    return finding_of(stack, **training).details


def trade_off(prior, noise, steps):
    """Return Phi(Phi^-1(kappa) + sqrt(T) / sigma)."""
    return norm.cdf(norm.ppf(prior) + math.sqrt(steps) / noise)


@pytest.mark.parametrize("prior", [0.01, 0.05, 0.5])
@pytest.mark.parametrize(("noise", "steps"), [(0.5, 1), (1.1, 1), (2.0, 9), (20.0, 4)])
def test_bound_of_a_defense_is_the_gaussian_trade_off_of_one_update(prior, noise, steps):
    records = DifferentialPrivacy(noise=noise).reconstruction_bound(prior, steps)
    assert records == pytest.approx(trade_off(prior, noise, steps), rel=1e-9)
    client = ClientPrivacy(noise=noise).reconstruction_bound(prior, steps)
    assert client == pytest.approx(trade_off(prior, noise, 1), rel=1e-9)  # one release at the end


@pytest.mark.slow
def test_a_finding_under_a_guarantee_has_the_bound_of_its_update_beside_the_rate():
    finding = finding_of("records")
    assert finding.identified is not None
    assert finding.details["reconstruction_bound"] == pytest.approx(trade_off(PRIOR, 1.1, 1))
    assert finding.details["reconstruction_prior"] == PRIOR
    assert json.dumps(finding.to_json())


@pytest.mark.slow
def test_every_local_step_counts_for_records_and_the_whole_for_a_client():
    training = {"learning_rate": 0.1, "steps": 3}
    records = details_of("records", **training)
    assert records["reconstruction_bound"] == pytest.approx(trade_off(PRIOR, 1.1, 3))
    client = details_of("client", **training)
    assert client["reconstruction_bound"] == pytest.approx(trade_off(PRIOR, 2.0, 1))


def test_of_two_guarantees_the_stronger_one_bounds():
    details = details_of("both")
    assert details["reconstruction_bound"] == pytest.approx(trade_off(PRIOR, 4.0, 1))


def test_without_noise_the_bound_says_no_bound():
    assert details_of("no noise")["reconstruction_bound"] == 1.0
    assert details_of("no noise, client")["reconstruction_bound"] == 1.0


@pytest.mark.parametrize("stack", ["baseline", "positions", "none"])
def test_a_defense_without_a_guarantee_gives_no_bound(stack):
    assert "reconstruction_bound" not in details_of(stack)


def test_every_form_of_the_report_prints_rate_and_bound_together():
    made = report()
    bound = round(100 * trade_off(PRIOR, 1.1, 1))
    wanted = f"identified 0 %, bound {bound} %"
    console = Console(file=io.StringIO(), width=80)
    made.print_to(console)
    for form in (console.file.getvalue(), made.to_markdown(), made.to_html()):
        assert wanted in " ".join(form.replace("&nbsp;", " ").split())
