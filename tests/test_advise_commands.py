"""The commands that `vitguard advise` prints audit what the advice is about."""

import json
import shlex

import pytest
import torch

import vitguard as vg
from tests.conftest import small_vit
from vitguard import data
from vitguard.advise import advise_report
from vitguard.advise.commands import ATTACK
from vitguard.cli.main import main
from vitguard.errors import InputError
from vitguard.evidence import Cell, Evidence
from vitguard.guard import protect
from vitguard.trained import train_only, trained_sizes
from vitguard.vit import Anatomy, canonical_parameters

TINY = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=96,depth=2,num_heads=3"
TRAINED = ("all", "head", "last-block/head", "lora:r=4/head", "adapters:r=4/head", "attention")


def stood(*stacks):
    cells = tuple(
        Cell(s, "a model", setting, 1, "natural", "ladder:seconds=3", 12.0, -3.0, "resisted")
        for s in stacks
        for setting in ("scratch", "finetune")
    )
    return Evidence("2026-11-30", {}, "", cells)


def commands(report):
    return [one.verify for one in (*report.options, *report.proven)]


TABLE = stood("privacy:noise=1.0")
ABOUT = [  # what is asked, and the words of each command beside model, stack and attack
    ({}, []),
    ({"batch_size": 3}, ["--batch-size", "3"]),
    ({"train": "lora:r=4/head"}, ["--train", "lora:r=4/head"]),
    ({"train": r"blocks\.0\.(attn|mlp)"}, ["--train", r"blocks\.0\.(attn|mlp)"]),
    ({"setting": "finetune"}, ["--checkpoint", "YOUR_WEIGHTS"]),
    ({"checkpoint": "my weights.pt"}, ["--checkpoint", "my weights.pt"]),
    (
        {"train": "head", "batch_size": 2, "checkpoint": "w.pt"},
        ["--checkpoint", "w.pt", "--train", "head", "--batch-size", "2"],
    ),
]


@pytest.mark.parametrize("asked, words", ABOUT)
def test_a_command_names_the_weights_the_trained_part_and_the_batch(asked, words):
    report = advise_report(TINY, table=TABLE, **asked)
    for command in (*commands(report), report.sentence().rpartition(": ")[2]):
        given = shlex.split(command)
        end = given.index("--defense")
        assert given[:4] == ["vitguard", "audit", "--model", TINY] and given[4:end] == words
    assert len(commands(report)) == 2


def test_weights_that_timm_publishes_are_named_where_they_still_fit():
    for spec in ("vit_tiny_patch16_224", "vit_tiny_patch16_224:img_size=112,num_classes=10"):
        report = advise_report(spec, setting="finetune", table=TABLE)
        assert all(" --pretrained " in c for c in commands(report))
        assert any("--checkpoint FILE" in note for note in report.notes)
    report = advise_report("vit_tiny_patch16_224:depth=1", setting="finetune", table=TABLE)
    assert all("--checkpoint YOUR_WEIGHTS" in c for c in commands(report))
    assert any("YOUR_WEIGHTS" in note for note in report.notes)


@pytest.mark.slow
def test_an_object_is_audited_by_a_call_since_no_name_builds_it():
    model, images = small_vit(), data.sample_images((32, 32), count=1, classes=10)
    report = advise_report(model, train="head", table=TABLE)
    for call in commands(report):
        assert call.startswith("vitguard.audit(train_only(model, 'head'), (images, labels), ")
        given = call.replace(ATTACK, "position")  # what is asked is that it runs
        names = {"vitguard": vg, "model": small_vit(), "train_only": train_only}
        made = {"images": images.pixels[..., :16, :16], "labels": images.labels}
        assert eval(given, names | made).findings


def test_a_stack_that_does_not_go_with_what_is_trained_is_not_offered():
    table = stood("frozen-stem:trained=0", "privacy:noise=1.0")
    for train, wanted in (("head", 2), ("attention", 1)):
        model = small_vit()
        report = advise_report(model, train=train, table=table)
        assert len(report.options) == wanted, report.options
        assert all(p.requires_grad for p in model.parameters())  # yours is not changed


def test_a_setting_of_random_weights_beside_a_file_of_weights_is_refused():
    with pytest.raises(InputError, match="finetune beside a checkpoint"):
        advise_report(TINY, setting="scratch", checkpoint="w.pt")


def test_a_model_that_no_audit_takes_is_refused():
    with pytest.raises(InputError, match="two classes or more"):
        advise_report(f"{TINY},num_classes=1")


def test_mistakes_say_what_would_have_been_taken():
    with pytest.raises(InputError, match="last-block, lora:r=4 and adapters:r=16"):
        advise_report(TINY, train="legs")
    with pytest.raises(InputError, match="at least one patch of 8 x 8 pixels, got 4 x 4"):
        advise_report(TINY.replace("img_size=32", "img_size=4"))
    with pytest.raises(InputError, match="Close to it: vit_base_patch16_224"):
        advise_report("vitbase_patch16_224")
    assert any("smaller batch" in note for note in advise_report(TINY, batch_size=1000).notes)


def test_a_model_without_exact_attacks_gets_a_command_of_few_steps_for_what_is_asked():
    report = advise_report("swin_tiny_patch4_window7_224", train="head", batch_size=2)
    command = report.sentence().partition("remain; ")[2].removesuffix(" is all that can be said.")
    words = shlex.split(command)
    assert words[4:8] == ["--train", "head", "--batch-size", "2"]
    assert words[8:] == ["--defense", "privacy:epsilon=8.0", "--attack", "inverting:iterations=20"]


@pytest.mark.parametrize("train", TRAINED)
def test_what_is_said_to_be_trained_is_what_is_trained_and_sent(train):
    model, same = small_vit(), small_vit()
    said = trained_sizes(model, Anatomy.of(model), train)
    assert train_only(model, train, seed=1) is model
    own = canonical_parameters(model)
    assert {n: p.numel() for n, p in own.items()} == said
    batch = torch.rand(2, 3, 16, 16), torch.tensor([1, 2])
    assert set(protect(model, "none").update(*batch).tensors) == set(said)
    other = canonical_parameters(train_only(same, train, seed=1))
    assert all(torch.equal(p, other[n]) for n, p in own.items())  # the same seed, the same values


@pytest.mark.slow
@pytest.mark.parametrize("train", ["head", "lora:r=2/head"])
def test_an_audit_of_a_part_sends_that_part_alone_and_ends_with_its_advice(train, capsys, tmp_path):
    file = tmp_path / "report.json"
    parts = [word for part in train.split("/") for word in ("--train", part)]
    given = ["--num-images", "1", "--attack", "position", "--defense", "privacy:noise=1.0"]
    model = f"{TINY},num_classes=10"
    assert main(["audit", "--model", model, *parts, *given, "--json", str(file)]) == 0
    said = json.loads(file.read_text())
    assert {f["verdict"] for f in said["findings"]} == {"blocked"}
    assert f"trained and sent: {train}" in " ".join(said["notes"])
    assert said["advice"] == advise_report(model, train=train).sentence()
    capsys.readouterr()
    stored = ["--update-file", "none.pt", "--train", "lora"]
    assert main(["audit", "--model", model, *stored]) == 2
    assert "adds layers" in capsys.readouterr().err
    assert main(["audit", "--model", model, "--train", "legs"]) == 2
    assert capsys.readouterr().err.startswith("vitguard: error: Expected")
