"""What is handed to the wrong place is refused there, with what to give instead."""

import pytest

from vitguard.defenses.encryption import KeySet
from vitguard.defenses.masking import Journal, MaskingClient, MaskingServer, SumOpener, Terms
from vitguard.errors import InputError, Rejected


@pytest.mark.parametrize("kind", ["text", "manifest", "none", "identities"])
def test_terms_of_another_kind_are_refused_with_how_to_read_them(make_run, kind):
    run = make_run(3)
    given = {
        "text": run.terms.to_json(), "manifest": run.manifest, "none": None,
        "identities": run.terms.identities,
    }[kind]  # fmt: skip
    name = run.names[0]
    for make in (
        lambda: MaskingClient(given, run.identities[name], client_id=name),
        lambda: MaskingServer(given, signing=run.signing, round_id=1),
        lambda: SumOpener(given),
    ):
        with pytest.raises(InputError, match=r"Expected the Terms of the run.*Terms\.from_json"):
            make()


@pytest.mark.parametrize("kind", ["public", "none", "keys"])
def test_signing_keys_of_another_kind_are_refused(make_run, kind):
    run = make_run(3)
    name = run.names[0]
    given = {"public": run.signing.public_bytes(), "none": None, "keys": KeySet.generate()}[kind]
    with pytest.raises(InputError, match="Expected the client's own SigningKey, got"):
        MaskingClient(run.terms, given, client_id=name)
    with pytest.raises(InputError, match="Expected the server's own SigningKey, got"):
        MaskingServer(run.terms, signing=given, round_id=1)


@pytest.mark.parametrize("identities", [None, [b"x" * 32] * 3, "client-0"])
def test_identities_that_name_nobody_are_refused(make_run, identities):
    run = make_run(3)
    with pytest.raises(InputError, match="public key of each client by its id"):
        Terms(run.manifest, identities, run.signing.public_bytes())


def test_a_journal_that_is_a_path_is_refused_before_a_round_begins(make_run, tmp_path):
    run = make_run(3)
    with pytest.raises(InputError, match=r"Expected a Journal, got .*Journal\(path\)"):
        run.client(run.names[0], journal=tmp_path / "journal")
    for path in (None, 5, "a\0b"):
        with pytest.raises(InputError, match="the path of a journal"):
            Journal(path)


@pytest.mark.parametrize("name", [["client-0"], None, 5])
def test_a_name_that_is_no_text_is_refused(make_run, name):
    run = make_run(3)
    with pytest.raises(InputError, match="a client id of 1 to 64 bytes"):
        MaskingClient(run.terms, run.identities["client-0"], client_id=name)
    _, server = run.drive(until="shares")
    with pytest.raises(Rejected, match="who made no shares"):
        server.inbox(name)


def test_a_step_before_its_turn_says_which_phase_the_round_is_in(make_run):
    _, server = make_run(3).drive(until="inbox")
    with pytest.raises(Rejected, match="Expected a round in the phase of answers, got one in the"):
        server.finish()
    with pytest.raises(Rejected, match="in the phase of keys, got one in the phase of values"):
        server.roster()
