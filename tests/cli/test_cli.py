"""The command line: exit codes, the JSON schema, and one clear line for every bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from vitguard.cli import audit as audit_command
from vitguard.cli import main
from vitguard.cli.main import _parser
from vitguard.models import build_model

SMALL = (
    "vit_tiny_patch16_224:img_size=32,patch_size=8,embed_dim=96,depth=2,num_heads=3,num_classes=10"
)


FEW = ("--num-images", "1")  # one image says whether there is a leak


def run(*arguments: str) -> int:
    try:
        return main(["audit", "--model", SMALL, *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


def report(*arguments: str) -> dict:
    assert run("--json", "out.json", *arguments) in (0, 1, 3)
    return json.loads(Path("out.json").read_text())


@pytest.mark.slow
def test_frozen_positions_leak_and_the_json_keeps_its_schema():
    result = report(*FEW, "--defense", "positions:kind=frozen", "--attack", "position", "span")
    assert result["schema"] == 1
    assert set(result) >= {
        "schema", "vitguard", "model", "images", "batch_size", "seed", "baseline", "findings",
    }  # fmt: skip
    assert set(result["model"]) == {"name", "parameters", "patches", "width"}
    assert set(result["baseline"]) == {"psnr", "patch_psnr", "thumbnail"}
    found = {(f["defense"], f["attack"]): f for f in result["findings"]}
    assert found["none", "position"]["verdict"] == "leaks"
    assert found["positions:kind=frozen", "position"]["verdict"] == "blocked"
    span = found["positions:kind=frozen", "span"]
    assert span["verdict"] == "leaks"
    assert set(span) >= {
        "defense", "attack", "verdict", "reason", "settings", "psnr", "patch_psnr", "ssim", "mse",
        "fft2d", "identified", "labels_correct", "mask", "decoys", "control", "seconds",
    }  # fmt: skip
    assert set(span["psnr"]) == {"max", "mean", "median", "min", "per_image"}
    assert set(span["patch_psnr"]) >= {"max", "mean", "median", "min"}
    assert set(span["control"]) == {"verdict", "psnr"}
    assert span["labels_correct"] == 1.0 and span["decoys"] == 1000 and span["mask"] is None
    assert found["positions:kind=frozen", "position"]["psnr"] is None


@pytest.mark.slow
def test_json_on_standard_output_is_nothing_but_json(capsys):
    assert run("--defense", "none", "--attack", "position", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["schema"] == 1


@pytest.mark.slow
def test_defaults_write_the_report_and_no_json():
    assert run("--num-images", "1", "--attack", "position") == 0
    assert Path("vitguard-report.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_default_defenses_that_do_not_fit_the_model_are_left_out_with_a_note(capsys):
    """Nobody chose them; what was chosen and does not fit is still an error."""
    sizes = "img_size=16,patch_size=4,embed_dim=32,depth=2,num_heads=2,num_classes=10"
    few = ("--model", f"beit_base_patch16_224:{sizes}", *FEW, "--attack", "position")
    assert main(["audit", *few, "--json", "out.json"]) == 0
    result = json.loads(Path("out.json").read_text())
    audited = {f["defense"] for f in result["findings"]}
    assert "privacy:epsilon=8.0,epochs=3" in audited and "positions:kind=frozen" not in audited
    (note,) = [n for n in result["notes"] if n.startswith("default defenses that do not fit")]
    assert "positions:kind=frozen, " in note and "absolute position embedding" in note
    capsys.readouterr()
    assert main(["audit", *few, "--defense", "positions:kind=frozen"]) == 2
    assert "absolute position embedding" in capsys.readouterr().err


@pytest.mark.slow
def test_the_defense_is_named_as_it_was_written():
    made = report(*FEW, "--defense", "positions:kind=sincos", "--attack", "position", "span")
    names = {f["defense"] for f in made["findings"]}
    assert names == {"none", "positions:kind=sincos"}


@pytest.mark.slow
def test_same_seed_same_report():
    arguments = ("--num-images", "2", "--defense", "noise:scale=0.1", "--attack", "span")
    arguments += ("--seed", "3")
    first, second = report(*arguments), report(*arguments)
    for result in (first, second):
        for finding in result["findings"]:
            finding.pop("seconds")
    assert first == second


@pytest.mark.slow
def test_withheld_parameters_are_named_as_blocked():
    result = report("--withhold", "patch", "--defense", "none", "--attack", "position")
    (finding,) = result["findings"]
    assert finding["verdict"] == "blocked" and "patch_embed.proj.weight" in finding["reason"]
    assert finding["control"]["verdict"] == "leaks"


@pytest.mark.slow
def test_difference_of_one_step_still_leaks():
    result = report(
        *FEW, "--update", "difference", "--lr", "0.1", "--defense", "positions:kind=frozen",
        "--attack", "span",
    )  # fmt: skip
    assert {f["verdict"] for f in result["findings"]} == {"leaks"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "defense", "attack", "code"),
    [
        (["--max-gain", "6"], "positions:kind=frozen", "span", 1),
        (["--max-psnr", "15"], "positions:kind=frozen", "span", 1),
        (["--max-gain", "6"], "positions:kind=frozen", "position", 3),
        (["--max-gain", "6"], "positions:kind=frozen", "april", 3),
        (["--max-psnr", "200"], "positions:kind=frozen", "span", 0),
        ([], "positions:kind=frozen", "span", 0),
    ],
)
def test_gate_exit_codes(gate, defense, attack, code):
    assert run(*FEW, "--defense", defense, "--attack", attack, *gate) == code


@pytest.mark.slow
def test_update_file_is_audited_on_its_own(photo, monkeypatch):
    import vitguard as vg
    from vitguard.audit import received
    from vitguard.models import normalization_of

    work, asked = received.Work, []
    monkeypatch.setattr(received, "Work", lambda *how: asked.append(how[0]) or work(*how))

    model = build_model(SMALL)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    guard = vg.protect(model, [vg.FixedPositions("frozen")])
    inputs = normalization_of(model).apply(pixels)
    guard.update(inputs, torch.tensor([3])).save("client.safetensors")
    arguments = ("--update-file", "client.safetensors", "--defense", "positions:kind=frozen")
    result = report(*arguments, "--attack", "span", "--workers", "2")
    assert asked == [2]
    client = next(f for f in result["findings"] if f["defense"] != "none")
    assert client["verdict"] == "leaks" and client["details"]["update_error"] < 0.05
    assert client["psnr"] is None
    with_wrong_truth = report(*arguments, "--attack", "span", "--images", str(photo))
    client = next(f for f in with_wrong_truth["findings"] if f["defense"] != "none")
    assert client["psnr"]["max"] < 20
    assert client["verdict"] == "leaks" and "none of the images" in client["reason"]
    assert run(*arguments, "--attack", "span", "--images", str(photo), "--max-gain", "6") == 1
    Image.open(photo).save("second.png")
    for wrong in (["--images", str(photo), "second.png"], ["--num-images", "1"],
                  ["--batch-size", "1"]):  # fmt: skip
        assert run(*arguments, *wrong) == 2


def test_a_wrong_option_names_its_command(capsys):
    assert run("--nonsense", "3") == 2
    assert "--nonsense 3 (see vitguard audit --help)" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["two\nlines", "--seed=a\nb"])
def test_a_usage_error_is_one_line_whatever_the_arguments_hold(word, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["audit", word])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.startswith("vitguard: error: ")
    assert said.count("\n") == 1


def test_the_listing_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) > 40 and max(map(len, shown)) <= 80


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gate", "attack", "said"),
    [
        (["--max-gain", "6"], "span", "positions:kind=frozen"),
        (["--max-gain", "6"], "position", "Undecided for"),
        ([], "span", None),
    ],
)
def test_a_gate_says_why(gate, attack, said, capsys):
    run(*FEW, "--defense", "positions:kind=frozen", "--attack", attack, *gate)
    shown = [row for row in capsys.readouterr().err.splitlines() if row.startswith("vitguard: ")]
    assert len(shown) == (said is not None)
    assert said is None or (shown[0].startswith("vitguard: gate: ") and said in shown[0])


@pytest.mark.slow
def test_parameters_and_iterations_reach_the_attacks(capsys):
    options = ("--parameters", "attention", "--iterations", "2")
    result = report(*FEW, "--attack", "inverting", *options)
    settings = result["findings"][0]["settings"]
    assert (settings["parameters"], settings["iterations"]) == ("attention", 2)
    for option in (["--parameters", "attention"], ["--iterations", "2"]):
        assert run(*option) == 2
        assert run("--attack", "position", *option) == 2
        assert option[0] in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_of_which_not_all_is_audited_says_so(photo):
    Path("folder").mkdir()
    for i in range(6):
        Image.open(photo).save(f"folder/{i}.png")
    assert run("--images", "folder", "--attack", "position", "--html", "some.html") == 0
    assert "the first 4 of 6 images" in Path("some.html").read_text()
    assert run("--images", "folder", "--num-images", "6", "--attack", "position",
               "--html", "all.html") == 0  # fmt: skip
    assert "the first" not in Path("all.html").read_text()


@pytest.mark.slow
def test_a_batch_beyond_the_sample_photos_is_filled_with_other_images_and_says_so():
    result = report("--batch-size", "9", "--attack", "position")
    assert result["batch_size"] == 9 and len(set(result["images"])) == 9
    assert any("2 of 9 images are crops" in note for note in result["notes"])


@pytest.mark.slow
def test_an_interrupted_audit_is_written_and_is_not_done(monkeypatch):
    from vitguard.attacks.span import SpanInversion

    def stopped(self, view, generator):
        raise KeyboardInterrupt

    monkeypatch.setattr(SpanInversion, "run", stopped)
    assert run("--attack", "position", "span", "--json", "out.json") == 130
    found = json.loads(Path("out.json").read_text())["findings"]
    assert [f["attack"] for f in found if f["verdict"] == "leaks"] == ["position"]


def _bad_files(folder: Path) -> None:
    (folder / "text.png").write_text("no image")
    (folder / "empty").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "tiny.png")
    (folder / "text.safetensors").write_text("no weights")
    model = build_model(SMALL)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    save_file({**state, "norm.weight": torch.full((96,), torch.nan)}, folder / "nan.safetensors")
    save_file({**state, "norm.weight": torch.ones(7)}, folder / "shape.safetensors")
    save_file({"other": torch.ones(7)}, folder / "other.safetensors")
    (folder / "classes" / "99").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(folder / "classes" / "99" / "a.png")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--images", "gone.png"], "gone.png"),
        (["--images", "text.png"], "text.png"),
        (["--images", "empty"], "empty"),
        (["--images", "tiny.png"], "tiny.png"),
        (["--images", "classes"], "99"),
        (["--checkpoint", "gone.safetensors"], "gone.safetensors"),
        (["--checkpoint", "text.safetensors"], "text.safetensors"),
        (["--checkpoint", "other.safetensors"], "other.safetensors"),
        (["--checkpoint", "shape.safetensors"], "norm.weight"),
        (["--checkpoint", "nan.safetensors"], "norm.weight"),
        (["--max-gain", "nan"], "--max-gain"),
        (["--max-psnr", "inf"], "--max-psnr"),
        (["--tensorboard", "text.png"], "text.png"),
        (["--model", "vit_nonsense"], "vit_nonsense"),
        (["--model", "vit_tiny_patch16_224:nonsense=1"], "nonsense"),
        (["--model", "resnet18"], "ResNet"),
        (["--model", "vit_tiny_patch16_224:num_classes=0,depth=1"], "classification head"),
        (["--defense", "nonsense"], "nonsense"),
        (["--defense", "positions:kind=nonsense"], "nonsense"),
        (["--defense", "positions:nonsense=1"], "nonsense"),
        (["--defense", "noise:scale=nan"], "nan"),
        (["--defense", "noise:scale=-1"], "-1"),
        (["--attack", "nonsense"], "nonsense"),
        (["--withhold", "nonsense"], "nonsense"),
        (["--withhold", "("], "("),
        (["--json", "gone/out.json"], "gone"),
        (["--html", "gone/out.html"], "gone"),
        (["--html", "out.pdf"], "out.pdf"),
        (["--num-images", "0"], "0"),
        (["--num-images", "99"], "99"),
        (["--batch-size", "many"], "many"),
        (["--update", "difference"], "--lr"),
        (["--lr", "0.1"], "difference"),
        (["--mean", "1,2,3"], "--std"),
        (["--mean", "a,b,c", "--std", "1,1,1"], "a,b,c"),
        (["--mean", "0,0,0", "--std", "0,1,1"], "0"),
        (["--optimizer", "lion"], "lion"),
        (["--device", "nonsense"], "nonsense"),
        (["--update-file", "gone.safetensors"], "gone.safetensors"),
        (["--update-file", "other.safetensors"], "other.safetensors"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments, named, tmp_path, capsys):
    _bad_files(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0 and named in error and "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_list_names_every_defense_and_attack(capsys):
    assert main(["list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert {"positions", "withheld", "noise", "pruning"} <= {d["name"] for d in listed["defenses"]}
    assert {"position", "span", "april"} <= {a["name"] for a in listed["attacks"]}
    assert main(["list"]) == 0
    assert "positions" in capsys.readouterr().out


def test_help_and_import_load_nothing_heavy():
    code = (
        "import sys, vitguard; from vitguard.cli.main import _parser; _parser().format_help(); "
        "heavy = {'torch', 'timm', 'opacus', 'tenseal', 'flwr', 'transformers', 'matplotlib', "
        "'tensorboard', 'numpy', 'rich'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_using_vitguard_loads_no_optional_package():
    code = (
        "import sys, vitguard as vg; [getattr(vg, n) for n in vg.__all__]; "
        "heavy = {'opacus', 'tenseal', 'flwr', 'transformers', 'matplotlib', 'tensorboard'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_plan_says_what_remains(capsys):
    assert main(["plan", "--model", SMALL, "--encrypt", "attention", "--json", "-"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == 1
    assert set(plan["encrypted"]) == {"parameters", "share", "bytes_up", "bytes_down"}
    remains = {a["attack"]: a for a in plan["attacks"]}
    assert remains["position"]["possible"] and "pos_embed" in remains["position"]["needs"]
    assert not remains["span"]["possible"] and remains["span"]["reason"]
    assert main(["plan", "--model", SMALL, "--encrypt", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "iterations", "budget"),
    [([], 400, True), (["--iterations", "7"], 7, False), (["--device", "cuda"], 120_000, False)],
)
def test_on_a_cpu_a_matching_attack_by_name_is_its_preset(arguments, iterations, budget):
    options = _parser().parse_args(["audit", "--attack", "gradvit", *arguments])
    (attack,) = audit_command._attacks(options)
    assert attack.iterations == iterations
    assert (attack.budget is not None) == budget
