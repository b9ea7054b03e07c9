"""TensorBoard events and the progress bar of attacks and training loops."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from vitguard.attacks.inverting import InvertingGradients
from vitguard.core import Normalization
from vitguard.defenses.privacy import ClientPrivacy, DifferentialPrivacy
from vitguard.defenses.shuffle import PatchShuffle
from vitguard.errors import InputError, MissingExtra
from vitguard.guard import protect
from vitguard.metrics import score
from vitguard.report import AuditReport, Baseline, Finding, ModelFacts, Pictures, Summary
from vitguard.threats import CuriousServer
from vitguard.tracking import (
    ProgressBar,
    TensorBoard,
    check_writable_folder,
    thumbnail,
    what_the_model_saw,
)

pytest.importorskip("tensorboard")


def make_model():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=1,
        num_heads=2,
        num_classes=5,
    )


@pytest.fixture
def attacked():
    truth = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    guard = protect(make_model().train(), [])
    update = guard.update(Normalization().apply(truth), torch.tensor([1]))
    return CuriousServer().view(guard, update, Normalization()), truth


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    reader.Reload()
    return reader


def test_an_attack_leaves_terms_psnr_pictures_and_settings(tmp_path, attacked):
    view, truth = attacked
    with TensorBoard(tmp_path, truth=truth, patch_size=(4, 4), every=4) as board:
        attack = InvertingGradients(iterations=6, watch=board)
        guess = attack.run(view, torch.Generator().manual_seed(0))
    reader = events(tmp_path)
    scalars = reader.Tags()["scalars"]
    assert {
        "inverting/distance",
        "inverting/total variation",
        "inverting/rate",
        "inverting/psnr",
        "inverting/patch psnr",
    } <= set(scalars)
    assert [e.step for e in reader.Scalars("inverting/distance")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in reader.Scalars("inverting/psnr")] == [1, 4, 6]
    seen = pictures(tmp_path, "inverting/estimate")[-1]
    for tag, patch in (("psnr", (16, 16)), ("patch psnr", (4, 4))):
        written = reader.Scalars(f"inverting/{tag}")
        assert [e.step for e in written] == [1, 4, 6]
        shown = torch.as_tensor(seen.copy()).permute(2, 0, 1)[None] / 255
        want = score(shown, truth, patch)
        value = want.psnr if tag == "psnr" else want.patch_psnr
        assert written[-1].value == pytest.approx(value.item(), abs=0.1) and value > 3
    assert {"inverting/truth", "inverting/estimate"} <= set(reader.Tags()["images"])
    assert "inverting/settings/text_summary" in reader.Tags()["tensors"]
    assert guess.details["iterations"] == 6


def test_training_writes_losses_epsilon_and_what_the_model_saw(tmp_path):
    guard = protect(make_model().train(), [DifferentialPrivacy(noise=2.0)])
    spent = []
    with TensorBoard(tmp_path) as board:
        for step in range(3):
            guard.update(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
            spent.append(guard.privacy_spent().epsilon)
            losses = {"task": torch.tensor(2.0 - step), "auxiliary": 0.1}
            board.training(guard, step=step, losses=losses, images=torch.zeros(2, 3, 16, 16))
    reader = events(tmp_path)
    assert [e.value for e in reader.Scalars("training/loss task")] == [2.0, 1.0, 0.0]
    written = [e.value for e in reader.Scalars("training/epsilon")]
    assert written == pytest.approx(spent) and 0 < spent[0] < spent[1] < spent[2]
    assert any("what the model saw" in tag for tag in reader.Tags()["images"])


def test_privacy_of_records_and_of_clients_have_a_curve_each(tmp_path):
    guard = protect(
        make_model().train(), [DifferentialPrivacy(noise=2.0), ClientPrivacy(noise=5.0)]
    )
    guard.update(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    with TensorBoard(tmp_path) as board:
        board.training(guard, step=0, losses={})
    reader = events(tmp_path)
    values = {name: guard.privacy_spent(name).epsilon for name in ("privacy", "client-privacy")}
    assert values["privacy"] > values["client-privacy"] > 0
    for name, value in values.items():
        assert reader.Scalars(f"training/epsilon {name}")[0].value == pytest.approx(value)
    assert "training/epsilon" not in reader.Tags()["scalars"]


def pictures(folder, tag):
    """Return the events of a tag of images, as arrays of (height, width, channels)."""
    found = events(folder).Images
    return [np.asarray(Image.open(io.BytesIO(e.encoded_image_string))) for e in found(tag)]


def patches_of(image, size=4):
    high, wide, channels = image.shape
    cut = image.reshape(high // size, size, wide // size, size, channels).swapaxes(1, 2)
    return cut.reshape(-1, size, size, channels)


def test_each_image_stands_beside_what_the_model_saw_and_beside_a_shuffle_of_70_percent(tmp_path):
    model = make_model().train()
    guard = protect(model, [PatchShuffle(ratio=0.5, mask="uniform", derangement=True)])
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    normalization = Normalization()
    images = normalization.apply(pixels)
    model(images)
    with TensorBoard(tmp_path) as board:
        how = {"step": 3, "images": images, "normalization": normalization}
        board.training(guard, losses={}, values={"accuracy": 0.5}, **how)
        board.shuffle_figure(guard, **how)
    assert events(tmp_path).Scalars("training/accuracy")[0].value == 0.5
    shown = np.asarray((pixels * 255).permute(0, 2, 3, 1))
    for what, moved in (("what the model saw", 8), ("shuffled at 70 %", None)):
        sheet = pictures(tmp_path, f"training/{what}")[0]
        assert sheet.shape == (32, 32, 3)
        for pair, image in zip(np.split(sheet, 2), shown, strict=True):
            left, right = np.split(pair, 2, axis=1)
            assert np.abs(left - image).max() <= 1
            before, after = patches_of(left), patches_of(right)
            elsewhere = (before != after).any((1, 2, 3)).sum()
            # 11 of 16 patches are drawn at 70 %, of which some stay by chance
            assert elsewhere == moved if moved else 6 <= elsewhere <= 11
            assert sorted(p.tobytes() for p in before) == sorted(p.tobytes() for p in after)


def test_a_stack_without_a_privacy_guarantee_writes_no_epsilon(tmp_path):
    with TensorBoard(tmp_path) as board:
        board.training(protect(make_model(), []), step=0, losses={"task": 1.0})
    assert "training/epsilon" not in events(tmp_path).Tags()["scalars"]


def test_what_the_model_saw_has_the_shuffled_patches_in_their_new_places():
    shuffle = pytest.importorskip("vitguard.defenses.shuffle")
    model = make_model().train()
    guard = protect(model, [shuffle.PatchShuffle(ratio=0.5)])
    images = torch.randn(2, 3, 16, 16)
    embedded = []
    hook = model.pos_drop.register_forward_pre_hook(lambda m, i: embedded.append(i[0]))
    with torch.no_grad():  # patches alone: no positions, known or unknown
        model.pos_embed.zero_()
        model.get_parameter("vitguard.shuffle.unknown").zero_()
    model(images)
    guard.auxiliary_loss()
    hook.remove()
    seen = what_the_model_saw(guard, images)
    assert not torch.equal(seen, images)
    model.eval()(images)
    assert torch.equal(what_the_model_saw(guard, images), images)  # no draw of the last training
    assert torch.equal(what_the_model_saw(guard, images[:1]), images[:1])
    guard.remove()
    torch.testing.assert_close(model.patch_embed(seen), embedded[-1][:, 1:], rtol=1e-4, atol=1e-5)


def audited():
    """Return a report of one attack that ran twice, with other settings, and left pictures."""
    summary = Summary.of([31.0, 20.0])
    shown = Pictures(original=torch.zeros(2, 1, 8, 8), reconstruction=torch.ones(2, 1, 8, 8))
    finding = Finding(
        "none",
        "span",
        "leaks",
        "nearly | all",
        psnr=summary,
        patch_psnr=Summary.of([32.0]),
        identified=0.75,
        images=shown,
    )
    return AuditReport(
        model=ModelFacts("vit", 1),
        images=("a", "b"),
        batch_size=2,
        baseline=Baseline(10.0, 12.0),
        findings=(finding, replace(finding, identified=0.25)),
        weights="random",
        update="one gradient",
    )


def test_audits_make_one_curve_for_each_defense_and_attack(tmp_path):
    with TensorBoard(tmp_path) as board:
        for step in (0, 10):
            board.audit(audited(), step=step)
    reader = events(tmp_path)
    assert [e.step for e in reader.Scalars("audit/none/span/psnr_max")] == [0, 10]
    assert reader.Scalars("audit/none/span/psnr_max")[0].value == 31.0
    assert reader.Scalars("audit/none/span/patch_psnr_max")[0].value == 32.0
    assert reader.Scalars("audit/none/span/gain")[0].value == 20.0
    assert [e.value for e in reader.Scalars("audit/none/span/identified")] == [0.75, 0.75]
    (verdict,) = reader.Tensors("audit/none/span/verdict/text_summary")[-1].tensor_proto.string_val
    assert verdict == b"**leaks** nearly \\| all"
    # the same attack with other settings: no zigzag between the two
    assert [e.value for e in reader.Scalars("audit/none/span-2/identified")] == [0.25, 0.25]


def test_a_report_has_the_same_tags_alone_and_during_a_training_run(tmp_path):
    with TensorBoard(tmp_path / "training") as board:
        board.audit(audited(), step=0)
    audited().to_tensorboard(tmp_path / "alone")
    tags = [events(tmp_path / where).Tags() for where in ("training", "alone")]
    assert tags[0] == tags[1]
    assert len(tags[0]["scalars"]) == 8
    named = [tag for kind in ("scalars", "images", "tensors") for tag in tags[0][kind]]
    assert all(tag.startswith("audit/") for tag in named)
    for shown in ("original", "reconstruction"):
        assert any(tag.startswith(f"audit/none/span-2/{shown}") for tag in tags[0]["images"])


def test_the_progress_bar_shows_distance_psnr_and_a_thumbnail(attacked):
    from rich.console import Console

    view, truth = attacked
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system="truecolor")
    with ProgressBar(truth=truth, every=1, console=console) as bar:
        InvertingGradients(iterations=3, watch=bar).run(view, torch.Generator().manual_seed(0))
    shown = screen.getvalue()
    assert "inverting" in shown and "distance" in shown and "PSNR" in shown and "▀" in shown


def test_a_thumbnail_keeps_colours():
    image = torch.zeros(3, 4, 4)
    image[0, :2] = 1.0
    text = thumbnail(image, columns=4)
    assert [line.count("▀") for line in text.plain.splitlines()] == [4, 4]
    assert "rgb(255,0,0)" in str(text.spans[0].style)


@pytest.mark.slow
def test_importing_the_module_loads_no_tensorboard():
    code = "import sys, vitguard.tracking; assert 'tensorboard' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(InputError):
        TensorBoard(tmp_path, every=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="below"):
        TensorBoard(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("truth", "named"),
    [
        (torch.rand(3, 16, 16), r"\(batch, 1 or 3, height, width\), got torch.float32 of shape"),
        (torch.rand(1, 4, 16, 16), "1 or 3"),
        (torch.rand(0, 3, 16, 16), "1 or 3"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
        (4 * torch.rand(1, 3, 16, 16) - 2, r"in \[0, 1\]"),
        (torch.full((1, 3, 16, 16), float("nan")), r"in \[0, 1\]"),
    ],
)
def test_truth_that_is_no_batch_of_images_is_refused(tmp_path, truth, named):
    for make in (lambda: TensorBoard(tmp_path, truth=truth), lambda: ProgressBar(truth=truth)):
        with pytest.raises(InputError, match=named):
            make()
    TensorBoard(tmp_path, truth=torch.tensor(1.0001).expand(1, 1, 2, 2)).close()


def test_truth_of_other_images_is_refused_in_the_first_iteration(tmp_path, attacked):
    view, _ = attacked
    for shape in ((2, 3, 16, 16), (1, 3, 8, 8)):
        bar = ProgressBar(truth=torch.rand(shape), every=1)
        for watch in (TensorBoard(tmp_path, truth=torch.rand(shape), every=99), bar):
            with pytest.raises(InputError, match=r"attacked, shape \(1, 3, 16, 16\)"):
                InvertingGradients(iterations=2, watch=watch).run(view, torch.Generator())
    resumed = SimpleNamespace(
        attack="inverting", iteration=7, iterations=50, terms={}, settings={}, seconds=0.0,
        estimate=lambda: torch.rand(1, 3, 16, 16),
    )  # fmt: skip
    with pytest.raises(InputError, match="attacked"):
        TensorBoard(tmp_path, truth=torch.rand(2, 3, 16, 16))(resumed)


def test_a_folder_is_checked_before_a_long_run_and_nothing_is_left(tmp_path, monkeypatch):
    check_writable_folder(tmp_path / "new" / "below")
    monkeypatch.chdir(tmp_path)
    check_writable_folder("runs")
    check_writable_folder("s3://bucket/runs")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none/here"):
        with pytest.raises(InputError, match="TensorBoard"):
            check_writable_folder(folder)


def test_a_missing_tensorboard_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    for call in (check_writable_folder, TensorBoard):
        with pytest.raises(MissingExtra, match=r"vitguard\[tensorboard\]"):
            call(tmp_path)
