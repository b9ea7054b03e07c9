"""Fishing by class and by a feature: what it catches, and what it says where it catches nothing."""

import pytest
import torch
import torch.nn.functional as F

import vitguard as vg
from vitguard.core import Normalization, Update
from vitguard.errors import InputError
from vitguard.threats import MaliciousServer
from vitguard.threats.crafts.fishing import Fishing

PLAIN = Normalization()


def gradient(model, weights, pixels, labels):
    """The gradient of the mean loss by name, in float64: nothing of the package."""
    model = model.double()
    model.load_state_dict(weights)
    model.zero_grad()
    F.cross_entropy(model(PLAIN.apply(pixels.double())), labels).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def finding(model, photos, labels, craft, attack="position"):
    report = vg.audit(model, (photos, labels), attacks=attack, threat=MaliciousServer(craft))
    (found,) = report.findings
    return found


@pytest.mark.parametrize("attack", ["position", "ladder:seconds=1"])
def test_where_no_image_is_of_the_class_the_report_says_so(small_vit, photos, attack):
    found = finding(small_vit(), photos[:2], torch.tensor([1, 3]), "fishing:label=5", attack)
    assert found.verdict == "not applicable"
    assert "no image of class 5 among the 2 behind the update" in found.reason


def test_a_head_that_begins_with_zeros_gets_weights_of_the_servers_own(small_vit, photos):
    model = small_vit()
    torch.nn.init.zeros_(model.head.weight)
    found = finding(model, photos[:2], torch.tensor([1, 3]), "fishing:label=3")
    assert found.verdict == "leaks" and found.psnr.max > 60


def test_the_head_tells_how_many_images_were_fished(small_vit, photos):
    model, craft = small_vit(), Fishing(label=3)
    weights = craft.weights(model)
    for labels, count in (([3, 3, 0, 3], 3), ([1, 3, 0, 0], 1)):
        tensors = gradient(small_vit(), weights, photos[:4], torch.tensor(labels))
        model.load_state_dict(weights)
        seen = craft.seen(Update(tensors, batch_size=4), model)
        assert seen.batch_size == count
        only = torch.tensor([i for i, y in enumerate(labels) if y == 3])
        alone = gradient(small_vit(), weights, photos[only], torch.full((count,), 3))
        name = "patch_embed.proj.weight"
        assert torch.allclose(seen.tensors[name], alone[name], rtol=1e-6, atol=1e-9)


def test_the_difference_of_one_step_is_fished_as_its_gradient_is(small_vit, photos):
    labels = torch.tensor([1, 3, 0, 1])
    report = vg.audit(
        small_vit(), (photos[:4], labels), attacks="position",
        training=vg.LocalTraining(0.01), threat=MaliciousServer("fishing:label=3"),
    )  # fmt: skip
    assert report.findings[0].verdict == "leaks"


def test_images_whose_gradients_were_scaled_are_not_said_to_be_of_no_class(small_vit, photos):
    """Of one size each, the head's bias counts no images any more; the fished one is read."""
    report = vg.audit(
        small_vit(), (photos[:4], torch.tensor([1, 3, 0, 1])), attacks="position",
        defenses="sample-normalisation", threat=MaliciousServer("fishing:label=3"),
    )  # fmt: skip
    (found,) = [f for f in report.findings if f.defense != "none"]
    assert found.verdict == "leaks" and found.psnr.max > 60


@pytest.mark.slow
def test_a_feature_leaves_one_image_of_a_batch_of_one_class(small_vit, photos):
    """By class all four count; above its threshold an image has no gradient at all."""
    labels, alone = torch.full((4,), 3), []
    for turn in range(12):
        craft = Fishing(label=3, quantile=0.3, turn=turn)
        model = small_vit()
        weights = craft.weights(model)
        each = [gradient(small_vit(), weights, photos[i : i + 1], labels[:1]) for i in range(4)]
        sizes = [float(g["patch_embed.proj.weight"].norm()) for g in each]
        caught = [i for i, size in enumerate(sizes) if size > 1e-9 * max(sizes)]
        tensors = gradient(small_vit(), weights, photos[:4], labels)
        model.load_state_dict(weights)
        update = Update(tensors, batch_size=4)
        if not max(sizes):
            assert "below the threshold" in craft.nothing(update, model)
            continue
        assert craft.seen(update, model).batch_size == len(caught)
        alone += caught if len(caught) == 1 else []
    assert alone, "in no turn did one image stand alone"
    assert finding(small_vit(), photos[:4], labels, "fishing:label=3").verdict != "leaks"


@pytest.mark.slow
def test_one_image_that_a_feature_catches_is_read(small_vit, photos):
    labels, model = torch.full((4,), 3), small_vit()
    told = [
        finding(model, photos[:4], labels, f"fishing:label=3,quantile=0.3,turn={turn}")
        for turn in range(6)
    ]
    read = [f for f in told if f.verdict == "leaks"]
    assert read and max(f.psnr.max for f in read) > 60


def test_turns_fish_one_class_after_the_other(small_vit):
    model = small_vit()
    first, second = (Fishing(label=9).turned(n).weights(model) for n in (0, 1))
    assert first["head.weight"][9].any() and not first["head.weight"][0].any()
    assert second["head.weight"][0].any() and not second["head.weight"][9].any()


@pytest.mark.parametrize("setting", [{"quantile": 1.0}, {"quantile": -0.1}, {"turn": -1}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(InputError):
        Fishing(**setting)
