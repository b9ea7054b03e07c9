"""What `vitguard advise` states; the audit confirms it in test_advise_confirmed.py."""

import io
import json
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console

from tests.conftest import small_vit
from vitguard.advise import advice, advise_report
from vitguard.analysis import released, remaining
from vitguard.cli.main import main
from vitguard.defenses.base import traits_of
from vitguard.defenses.frozen_stem import FrozenStem
from vitguard.errors import InputError, UnsupportedModel
from vitguard.evidence import Cell, Cost, Evidence, Stack, evidence
from vitguard.models import build_model
from vitguard.vit import Anatomy

MODELS = [  # name, batch whose tokens fill the width, batch from which no exact count holds
    ("vit_tiny_patch16_224", 1, 1),
    ("vit_small_patch16_224", 2, 2),
    ("vit_base_patch16_224", 4, 3),
    ("vit_large_patch16_224", 6, 3),
    ("vit_base_patch32_224", 16, 9),
    ("deit_base_patch16_224", 4, 3),
    ("vit_small_patch14_dinov2:img_size=112", 6, 4),
    ("vit_base_patch14_dinov2:img_size=112", 12, 7),
    ("vit_base_patch16_siglip_224", 4, 3),
    ("beit_base_patch16_224", 4, 4),
]
SWIN = "swin_tiny_patch4_window7_224"
WORDS = ("safe", "secure", "protected")


def printed(report):
    out = io.StringIO()
    report.print_to(Console(file=out, width=100, color_system=None))
    return out.getvalue()


def built_without_values():
    """Older releases of timm build models with values only, which takes its time."""
    try:
        with torch.device("meta"):
            timm.create_model("vit_tiny_patch16_224", depth=2)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    "name, full, ends",
    [*MODELS[:3], *(pytest.param(*case, marks=pytest.mark.slow) for case in MODELS[3:])],
)
def test_a_model_that_people_use_is_advised_on_in_two_seconds_and_never_called_safe(
    name, full, ends
):
    timm.list_models("vit_tiny*")  # the import is not counted
    began = time.process_time()
    report = advise_report(name)
    assert time.process_time() - began < 2 or not built_without_values()
    said = f"{printed(report)} {json.dumps(report.to_json())}".lower()
    assert not [word for word in WORDS if word in said]
    if ends > 1:
        assert report.exact and f"from {ends} images on" in report.sentence()
    named = {a.attack: a for a in report.attacks}
    for attack in ("span", "span-chain", "gelu-span"):
        one = named[attack]
        assert (one.ends_at is not None and one.ends_at <= full) or not one.applies
    search = named["token-search"]  # in part, until the tokens fill three times the width
    assert not search.applies or full <= search.ends_at <= 3 * full
    assert not advise_report(name, batch_size=ends).exact or ends == 1


def test_a_model_of_several_widths_and_one_that_is_no_transformer_get_one_clear_answer():
    report = advise_report(SWIN)
    assert report.sentence() == report.unsupported and not report.attacks and not report.options
    assert (
        "96 to 768 wide" in report.unsupported
        and " ".join(printed(report).split()) == report.unsupported
    )
    with pytest.raises(UnsupportedModel, match="ResNet"):
        advise_report("resnet18")
    with pytest.raises(InputError, match="timm model name"):
        advise_report("vit_bass_patch16_224")


@pytest.mark.parametrize("train", ["all", "head", "last-block/head", "lora/head"])
@pytest.mark.parametrize("changes", [{}, {"class_token": False, "global_pool": "avg"}])
def test_sizes_alone_say_what_a_model_with_values_says(changes, train):
    model = small_vit(**changes)
    bare = small_vit(**changes).to("meta")
    for batch in (1, 3, 6):
        real, sized = (
            advise_report(m, batch_size=batch, train=train).to_json() for m in (model, bare)
        )
        assert real == sized


def test_a_name_says_what_the_model_of_that_name_says():
    name = "vit_tiny_patch16_224:img_size=32,patch_size=8,depth=2,num_classes=10"
    by_name, by_model = advise_report(name).to_json(), advise_report(build_model(name)).to_json()
    for said in (by_name, by_model):  # commands name the model as well
        del said["model"], said["sentence"]
        for one in (*said["options"], *said["proven"]):
            assert one.pop("verify")
    assert by_name == by_model and by_name["proven"]


@pytest.mark.slow
def test_a_batch_is_where_the_tokens_fill_the_width_and_every_batch_was_asked():
    """By bisection as by looking at each: no attack that ended comes back at a larger batch."""
    for model in (small_vit(), small_vit(reg_tokens=3), small_vit(embed_dim=64)):
        anatomy = Anatomy.of(model)
        plain = traits_of([], anatomy)
        report = advise_report(model)
        said = [
            {a.attack: a for a in remaining(released(model, anatomy, plain, batch_size=b))}
            for b in range(1, 120)
        ]
        for one in report.attacks:
            holds = [at[one.attack].possible for at in said]
            exact = [at[one.attack].possible and at[one.attack].exact for at in said]
            assert holds == sorted(holds, reverse=True) and exact == sorted(exact, reverse=True)
            assert sum(exact) == one.exact_until
            assert sum(holds) + 1 == one.ends_at if one.ends_at else all(holds)
        full = next(a for a in report.attacks if a.attack == "gelu-span")
        assert full.ends_at * anatomy.tokens >= anatomy.width
        assert (full.ends_at - 1) * anatomy.tokens < anatomy.width


def test_what_is_trained_decides_what_applies():
    said = {
        part: {a.attack for a in advise_report(small_vit(), train=part).attacks if a.applies}
        for part in ("all", "head", "last-block/head", "lora:r=4/head", "attention")
    }
    assert {"position", "span", "gelu-span"} <= said["all"]
    assert said["head"] == {"labels", "matching"}
    assert said["last-block/head"] == {"cascade", "containment", "labels", "matching"}
    assert said["lora:r=4/head"] == {"labels", "containment", "matching"}
    assert "span" in said["attention"] and "position" not in said["attention"]


def cell(stack, **changes):
    given = {"model": "a model", "verdict": "resisted", "psnr": 12.0, "above": -3.0, **changes}
    where = {"setting": "scratch", "batch": 8, "case": "natural", "attack": "ladder:seconds=30"}
    return Cell(stack, **{**where, **given})


STOOD = "positions:kind=frozen+batch-floor+sample-normalisation"
TABLE = Evidence(
    "2026-11-29", {"torch": "2"}, "python benchmarks/evidence.py rows.jsonl",
    (
        cell("none", verdict="leaks"), cell("sign-update"),
        cell("sign-update", verdict="leaks", above=9.0), cell("quantised-update", above=2.5),
        cell("low-rank", proved=0.1), cell("noise:scale=0.5", verdict="", note="not run: no time"),
        cell(STOOD), cell(STOOD, cut="map", model="another"),
        cell("encryption:select=all", verdict="blocked"),
        cell("privacy:noise=1.0"), cell("positions:kind=frozen"),
    ),
    (
        Cost(STOOD, "a model", "scratch", 0.5, 0.51, 3, 100, 1.5, 1.0),
        Cost("privacy:noise=1.0", "a model", "scratch", 0.3, 0.51, 3, 100, 1.5, 1.0),
    ),
)  # fmt: skip


def test_only_what_stood_in_every_cell_is_offered_the_cheapest_first():
    report = advise_report(small_vit(), table=TABLE)
    offered = [o.stack for o in report.options]
    assert offered == [STOOD, "privacy:noise=1.0"]
    assert set(report.fallen) == {"sign-update", "quantised-update", "low-rank"}
    assert len(report.fell_to) == 3 and all(report.fell_to)
    best = report.options[0]
    assert best.batch == 23 and best.verify.endswith("batch_size=23)")  # 4 x 96 / 17
    assert "stood in 2 of 2 measurements" in best.evidence and "by its budget" in best.evidence
    assert "accuracy 50.0% where undefended has 51.0%" in best.evidence
    assert STOOD in report.sentence() and "no proof" in report.sentence()


def test_what_fell_on_trained_weights_has_not_stood_on_random_ones():
    """Weights do not stay random: what falls on those that somebody trained falls later."""
    cells = (
        cell("none", verdict="leaks"),
        cell("sign-update"),
        replace(cell("sign-update", verdict="leaks", above=7.25), setting="finetune"),
    )
    (stack,) = Evidence("", {}, "", cells).stacks("scratch")
    assert stack.fell and not stack.stood
    assert stack.fell_to() == "ladder, +7.2 dB from the thumbnail; in finetune"
    (stack,) = Evidence("", {}, "", cells[:2]).stacks("scratch")
    assert stack.stood


def test_what_stood_elsewhere_is_not_offered_where_a_count_says_that_it_leaks():
    assert "positions:kind=frozen" not in [
        o.stack for o in advise_report(small_vit(), table=TABLE).options
    ]  # `span` reads it at one image


def test_what_a_defense_says_of_its_own_updates_stands_beside_the_stack_and_in_the_sentence():
    """Features of the class token stand in a head's gradient, whatever resisted."""
    table = replace(TABLE, cells=(cell("none", verdict="leaks"), cell("frozen-stem:trained=0")))
    report = advise_report(small_vit(), table=table)
    (option,) = report.options
    assert "class-token features" in option.shows and option.shows == FrozenStem(0).audit_note()
    assert option.shows in report.to_json()["options"][0]["shows"]
    assert "stillshows:" in "".join(printed(report).split())
    assert "class-token features" in report.sentence()
    (other,) = advise_report(small_vit(), table=replace(TABLE, cells=(
        cell("none", verdict="leaks"), cell("privacy:noise=1.0")))).options  # fmt: skip
    assert not other.shows


BARE = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=96,depth=1,num_classes=0"


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name, batch", [(BARE, 1), (BARE.replace("classes=0", "classes=10"), 9)])
def test_commands_that_are_printed_run(name, batch, capsys):
    """Of a backbone without a head, too, and of more images than there are sample photos."""
    cells = (cell("none", verdict="leaks"), cell("privacy:noise=1.0"))
    report = advise_report(name, batch_size=batch, table=replace(TABLE, cells=cells))
    commands = [o.verify for o in (*report.options, *report.proven)]
    assert len(commands) == 2 and (batch == 1 or f"--batch-size {batch} " in commands[0])
    for command in commands:
        words = shlex.split(command)
        words[words.index("--attack") + 1] = "position"  # no search: what is asked is that it runs
        assert words[0] == "vitguard" and main(words[1:]) == 0, capsys.readouterr().err
        capsys.readouterr()


def test_keys_hide_from_the_server_and_not_from_the_other_clients():
    for see in ("server", "clients", "both"):
        report = advise_report(small_vit(), table=TABLE, see=see)
        proven = [p.stack for p in report.proven]
        assert ({"encryption", "masking"} <= set(proven)) is (see == "server")
        assert "privacy:epsilon=8.0" in proven and "encryption" not in str(report.options)


def test_a_stack_with_keys_that_stood_is_offered_against_the_server_alone():
    keyed = "encryption:select=plan"
    table = replace(TABLE, cells=(cell("none", verdict="leaks"), cell(keyed), cell(STOOD)))
    for see in ("server", "clients", "both"):
        options = advise_report(small_vit(), table=table, see=see).options
        assert [o.stack for o in options] == ([STOOD, keyed] if see == "server" else [STOOD])
        assert all(o.hides_from == "server" for o in options if o.stack == keyed)


def test_what_holds_by_proof_is_read_from_the_defenses_and_no_name_stands_in_the_code(monkeypatch):
    from vitguard import advise
    from vitguard.advise import stacks
    from vitguard.defenses.sign_update import SignUpdate
    from vitguard.registry import defense_types

    class Promising(SignUpdate):
        name = "promising"
        promise = "it holds because of a proof"

    known = {**defense_types(), "promising": Promising}
    monkeypatch.setattr(stacks, "defense_types", lambda: known)
    said = {p.stack: p for p in advise_report(small_vit(), see="both").proven}
    assert said["promising"].says == Promising.promise
    assert "defenses='promising', attacks='ladder" in said["promising"].verify
    assert all(d.promise for n, d in known.items() if n in ("privacy", "encryption", "masking"))
    code = "".join(path.read_text() for path in Path(advise.__path__[0]).glob("*.py"))
    for name in defense_types():
        assert f'"{name}' not in code, name


@pytest.mark.parametrize(
    "shows",
    [{"verdict": v} for v in ("blocked", "not applicable", "inconclusive")] + [{"cut": "map"}],
)
def test_a_stack_on_which_no_attack_came_to_its_end_has_not_stood(shows):
    table = Evidence("", {}, "", (cell("none", verdict="leaks"), cell("sign-update", **shows)))
    (stack,) = table.stacks("scratch")
    assert not stack.fell and not stack.stood
    assert not advise_report(small_vit(), table=table).options


def test_what_resisted_beside_an_attack_that_was_cut_has_not_stood():
    """`position` reads nothing of a low rank; the search that was made for it was cut."""
    cells = (cell("low-rank"), cell("low-rank", attack="position"))
    assert Stack("low-rank", "scratch", cells, ()).stood
    for shows in ({"cut": "containment"}, {"verdict": "", "note": "not run"}):
        (one, other) = cells
        assert not Stack("low-rank", "scratch", (replace(one, **shows), other), ()).stood
    assert Stack("low-rank", "scratch", (*cells, cell("low-rank", model="b", cut="map")), ()).stood


def test_without_evidence_it_says_so_and_offers_nothing():
    report = advise_report(small_vit(), table=Evidence("", {}, ""))
    assert not report.options and "no evidence" in report.measured
    assert "audit it" in report.sentence()


def test_the_evidence_that_the_package_carries_can_be_read_and_says_when_it_was_made():
    table = evidence()
    assert table.date and {"torch", "timm", "vitguard"} <= set(table.versions)
    assert all(c.verdict or c.note.startswith("not run") for c in table.cells)
    assert {s.setting for s in (*table.stacks("scratch"), *table.stacks("finetune"))} == {
        "scratch", "finetune",
    }  # fmt: skip


@pytest.mark.usefixtures("unchecked")
def test_the_command_prints_and_writes_it(tmp_path, capsys):
    tiny = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=96,depth=2,num_classes=10"
    assert main(["advise", "--model", tiny, "--batch-size", "2", "--see", "server"]) == 0
    assert "ends at batch" in capsys.readouterr().out
    assert main(["advise", "--model", tiny, "--train", "head", "--json", "-"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == 1 and said["sentence"] and said["train"] == "head"
    file = tmp_path / "advice.json"
    assert main(["advise", "--model", tiny, "--setting", "finetune", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["setting"] == "finetune"
    for wrong in (["--setting", "tune"], ["--see", "all"], ["--batch-size", "0"],
                  ["--train", "legs"]):  # fmt: skip
        assert main(["advise", "--model", tiny, *wrong]) == 2
        assert capsys.readouterr().err.startswith("vitguard: error: Expected")


@pytest.mark.slow
def test_an_audit_ends_with_the_sentence_in_every_form(tmp_path, capsys):
    tiny = "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=96,depth=2,num_classes=10"
    page, file = tmp_path / "report.html", tmp_path / "report.json"
    given = ["--model", tiny, "--num-images", "1", "--attack", "position"]
    forms = ["--defense", "positions:kind=frozen", "--html", str(page), "--json", str(file)]
    assert main(["audit", *given, *forms]) == 0
    said = advise_report(tiny).sentence()
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.endswith(f"What to use: {said}")
    assert json.loads(file.read_text())["advice"] == said
    assert "What to use" in page.read_text()


def test_a_model_that_cannot_be_built_without_values_is_advised_on_as_well(monkeypatch):
    """Older releases of timm read numbers out of tensors while they build a model."""
    name, real = "vit_tiny_patch16_224:depth=1", advice.build_model

    def older(spec):
        if torch.empty(0).is_meta:
            raise InputError("Tensor.item() cannot be called on meta tensors")
        return real(spec)

    wanted = advise_report(name).to_json()
    monkeypatch.setattr(advice, "build_model", older)
    assert advise_report(name).to_json() == wanted


def test_a_stack_that_fell_says_to_what_and_how_far():
    cell = Cell("low-rank", "a ViT", "finetune", 1, "natural", "ladder:seconds=30", 18.0, -3.0)
    cells = (
        replace(cell, verdict="resisted"),
        replace(cell, attack="map:seconds=30", psnr=25.0, above=3.04, verdict="inconclusive"),
        replace(cell, attack="span", psnr=None, above=None, verdict="leaks"),
    )
    told = Stack("low-rank", "finetune", cells, ()).fell_to()
    assert told == "map, +3.0 dB from the thumbnail"
    assert Stack("low-rank", "finetune", cells[::2], ()).fell_to() == "span leaks"
    assert Stack("low-rank", "finetune", cells[:1], ()).fell_to() == ""


@pytest.mark.slow
def test_advice_loads_nothing_that_only_attacks_and_figures_need():
    """An answer waits for torch and timm; SciPy alone would be a fifth of the wait again."""
    code = (
        "import sys\nfrom vitguard.cli.main import main\n"
        "assert main(['advise', '--model', 'vit_tiny_patch16_224:depth=1', '--json', '-']) == 0\n"
        "heavy = {'scipy', 'matplotlib', 'opacus', 'tenseal', 'flwr', 'transformers', 'skimage'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_the_recommendation_says_what_the_evidence_says():
    """Five sentences, of which each figure stands in the table that the package carries."""
    page = (Path(__file__).parent.parent / "docs" / "advise.md").read_text()
    said = page.split("<!-- recommendation -->")[1].split("<!-- end of recommendation -->")[0]
    assert [line[:2] for line in said.splitlines() if line[:1].isdigit()] == [
        f"{n}." for n in range(1, 6)
    ]
    assert not [word for word in WORDS if word in said.lower()]
    stacks = {s.spec: s for s in evidence().stacks("finetune")}
    bare = [s for s in stacks.values() if "privacy" not in s.spec]
    assert not any(s.stood for s in bare) and "no stack stood everywhere" in said

    def worst(spec):
        return max(c.above for c in stacks[spec].measured if c.above is not None)

    assert f"{worst('frozen-stem:trained=0'):.1f} dB" in said
    assert f"{worst('frozen-stem:trained=2'):.0f} dB" in said
    alone = [c for c in stacks["frozen-stem"].measured if c.verdict != "blocked"]
    assert alone and all(c.cut for c in alone) and not stacks["frozen-stem"].fell
    floor = "frozen-stem+batch-floor+sample-normalisation"
    leaks = [c for c in stacks[floor].measured if c.verdict == "leaks"]
    assert leaks and all(c.case == "dominant" for c in leaks)
    assert {c.note.partition(" dB")[0] for c in leaks} == {"6.6"} and "6.6 dB above" in said
    for spec in ("frozen-stem:trained=0", "frozen-stem:trained=2", floor, "positions:kind=frozen"):
        assert stacks[spec].fell
    assert said.count("**fell**") == 3
    for alone in ("sign-update", "quantised-update:bits=4"):
        assert stacks[alone].fell
    rank = stacks["low-rank:rank=2"]
    groups = [[c for c in rank.measured if c.model == m] for m in {c.model for c in rank.measured}]
    assert not rank.fell and all(any(c.cut for c in group) for group in groups)
    for top in ("low-rank:rank=2", "sign-update"):
        assert not stacks[f"{floor}+{top}"].fell and not stacks[f"{floor}+{top}"].stood
