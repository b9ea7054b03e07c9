"""The report: its JSON, its gates, its words and its forms."""

from __future__ import annotations

import io
import json
import math
import os
import re
import stat
from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image
from rich.console import Console

from vitguard import errors
from vitguard.report import (
    AuditReport,
    Baseline,
    Control,
    Finding,
    Mask,
    ModelFacts,
    Pictures,
    Summary,
)

FIXED = "positions:kind=frozen"
STACK = "positions:kind=sincos+shuffle:ratio=0.7"
NAN = float("nan")


def summary(*values: float) -> Summary:
    made = Summary.of(values)
    assert made is not None
    return made


def finding(
    defense: str = FIXED, verdict: str = "resisted", level: float = 12.0, **more
) -> Finding:
    defaults = {"attack": "span", "psnr": summary(level), "patch_psnr": summary(level)}
    return Finding(defense=defense, verdict=verdict, **{**defaults, **more})  # type: ignore[arg-type]


def unmeasured(verdict: str, defense: str = FIXED, **more) -> Finding:
    return finding(defense, verdict, **{"psnr": None, "patch_psnr": None, **more})


def report(*findings: Finding, **more) -> AuditReport:
    facts = {
        "model": ModelFacts("vit_tiny_patch16_224", 5_717_416, 196, 192),
        "images": ("astronaut",),
        "batch_size": 1,
        "baseline": Baseline(psnr=10.0, patch_psnr=11.0),
        "weights": "random initialisation",
        "update": "one gradient",
        "families_not_run": ("ladder", "matching"),
    }
    return AuditReport(findings=findings, **{**facts, **more})


def pictures(size: int = 8, count: int = 1) -> Pictures:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, size, size, generator=generator)
    return Pictures(images, images.clone(), 1 - images, tuple(f"image-{i}" for i in range(count)))


def full_report() -> AuditReport:
    control = Control("leaks", summary(104.0))
    return report(
        finding("none", "leaks", 65.0, decoys=100, identified=1.0, images=pictures()),
        finding(
            STACK,
            "resisted",
            control=control,
            mask=Mask(1.0, 0.994),
            settings={"source": "qkv", "starts": (1, 2)},
            details={"residual": NAN, "rank": torch.tensor(3)},
            seconds=0.8,
            ssim=summary(0.2),
            mse=summary(0.06),
            fft2d=summary(0.3),
            identified=0.02,
            labels_correct=1.0,
            decoys=100,
            images=pictures(),
        ),
        unmeasured(
            "blocked", reason="pos_embed cannot be read", attack="position", control=control
        ),
        unmeasured(
            "not applicable",
            "none",
            attack="fgsm",
            clean_accuracy=0.98,
            robust_accuracy={"8/255": 0.03},
        ),
        threat={"withheld": ["position"]},
        notes=("Labels were not given.",),
    )


class TestJson:
    def test_keys_and_their_order_are_those_of_the_design(self) -> None:
        data = json.loads(full_report().to_json_text())
        assert list(data)[:8] == (
            ["schema", "vitguard", "model", "images", "batch_size", "seed", "baseline", "findings"]
        )
        assert data["schema"] == 1
        assert list(data["model"]) == ["name", "parameters", "patches", "width"]
        assert list(data["baseline"]) == ["psnr", "patch_psnr", "thumbnail"]
        entry = data["findings"][1]
        names = ", ".join(list(entry)[:16])
        assert names == (
            "defense, attack, verdict, reason, settings, psnr, patch_psnr, ssim, mse, fft2d, "
            "identified, labels_correct, mask, decoys, control, seconds"
        )
        assert list(entry["psnr"]) == ["max", "mean", "median", "min", "per_image"]
        assert list(entry["patch_psnr"])[:4] == ["max", "mean", "median", "min"]
        assert set(entry["ssim"]) == {"max", "mean"}
        assert set(entry["mse"]) == set(entry["fft2d"]) == {"min", "mean"}
        assert entry["mask"] == {"precision": 1.0, "recall": 0.994}
        assert entry["control"] == {"verdict": "leaks", "psnr": {"max": 104.0, "mean": 104.0}}
        assert entry["gain"] == pytest.approx(1.0)

    def test_extra_facts_follow(self) -> None:
        data = full_report().to_json()
        assert data["weights"] == "random initialisation"
        assert data["threat"] == {"withheld": ["position"]}
        assert data["families_not_run"] == ["ladder", "matching"]
        fgsm = data["findings"][3]
        assert fgsm["clean_accuracy"] == 0.98
        assert fgsm["robust_accuracy"] == {"8/255": 0.03}

    def test_values_that_do_not_exist_are_null_never_nan_or_infinity(self) -> None:
        text = report(
            finding(level=NAN, seconds=math.inf, details={"residual": [NAN, -math.inf, 1.0]}),
            unmeasured("blocked"),
            baseline=Baseline(NAN, math.inf),
        ).to_json_text()

        def refuse(constant: str) -> None:
            pytest.fail(f"{constant} in the JSON")

        first, second = json.loads(text, parse_constant=refuse)["findings"]
        assert first["psnr"]["max"] is None
        assert first["psnr"]["per_image"] == [None]
        assert first["seconds"] is None
        assert first["details"] == {"residual": [None, None, 1.0]}
        assert second["psnr"] is second["mask"] is second["control"] is None

    def test_tensors_tuples_and_unknown_settings_become_plain_values(self) -> None:
        settings = {"a": torch.tensor([1.5, 2.0]), "b": (1, "x"), "c": torch.float32, 3: None}
        entry = report(finding(settings=settings)).to_json()["findings"][0]
        assert entry["settings"] == {
            "a": [1.5, 2.0],
            "b": [1, "x"],
            "c": "torch.float32",
            "3": None,
        }


class TestSummary:
    def test_statistics(self) -> None:
        made = summary(1.0, 2.0, 9.0)
        assert (made.max, made.mean, made.median, made.min) == (9.0, 4.0, 2.0, 1.0)
        assert made.per_image == (1.0, 2.0, 9.0)
        assert Summary.of(torch.tensor([1.0, 3.0])) == summary(1.0, 3.0)

    def test_no_images_give_none(self) -> None:
        assert Summary.of([]) is None

    def test_one_nan_spoils_every_statistic(self) -> None:
        made = summary(50.0, NAN)
        assert math.isnan(made.max) and math.isnan(made.mean) and not made.finite


class TestGate:
    """0 passes; 1 exceeds a limit; 3 was not decided."""

    @pytest.mark.parametrize(
        ("findings", "code"),
        [
            ([finding(level=12.0)], 0),
            ([finding(level=15.0)], 0),  # at the limit, not above it
            ([finding(level=15.1)], 1),
            ([finding(verdict="leaks", level=65.0)], 1),
            ([finding(verdict="inconclusive", level=20.0)], 1),
            ([finding(verdict="inconclusive", level=12.0)], 3),
            ([unmeasured("blocked")], 3),
            ([unmeasured("not applicable")], 3),
            ([unmeasured("leaks")], 1),  # it reproduces the update; there is no truth to measure
            ([finding(verdict="leaks", level=5.0)], 1),  # told from decoys: no dB limit sees that
            (
                [finding(verdict="leaks", level=14.0, gain=8.0)],
                0,
            ),  # in dB alone, and within the limit
            ([finding(verdict="leaks", level=14.0, gain=8.0, unseen="told from decoys")], 1),
            ([unmeasured("blocked"), finding(level=12.0)], 0),
            ([finding(level=12.0), unmeasured("blocked", STACK)], 3),
            ([finding(level=65.0), unmeasured("blocked", STACK)], 1),
            ([finding("none", "leaks", 65.0)], 3),
            ([finding("none", "leaks", 65.0), finding(level=12.0)], 0),
            ([finding(level=NAN)], 3),
            ([finding(level=12.0), finding(level=NAN, attack="position")], 3),
            ([finding(patch_psnr=summary(12.0, NAN))], 3),
            ([finding(patch_psnr=summary(40.0, NAN))], 1),
            ([finding(level=math.inf)], 1),
            ([], 3),
        ],
    )
    def test_max_psnr(self, findings: list[Finding], code: int) -> None:
        made = report(*findings)
        assert made.gate(max_psnr=15.0) == code
        if code:
            with pytest.raises(errors.LeakFound):
                made.raise_if_leaks(max_psnr=15.0)
        else:
            made.raise_if_leaks(max_psnr=15.0)

    def test_max_gain_is_above_the_baseline(self) -> None:
        made = report(finding(level=17.5))  # 6.5 dB above 11
        assert made.gate(max_gain=6.0) == 1
        assert made.gate(max_gain=7.0) == 0
        assert made.gate(max_psnr=20.0, max_gain=6.0) == 1

    def test_a_gain_that_the_audit_measured_per_image_goes_first(self) -> None:
        made = report(finding(level=17.5, gain=2.0))
        assert made.gate(max_gain=6.0) == 0
        assert made.to_json()["findings"][0]["gain"] == 2.0

    def test_no_gate_passes_whatever_was_found(self) -> None:
        assert report(finding(verdict="leaks", level=65.0)).gate() == 0

    @pytest.mark.parametrize("gain", [None, NAN])
    def test_a_gain_or_baseline_of_nan_stays_undecided(self, gain: float | None) -> None:
        made = report(finding(gain=gain), baseline=Baseline(NAN, NAN))
        assert made.gate(max_gain=6.0) == 3
        with pytest.raises(errors.LeakFound):
            made.raise_if_leaks()

    @pytest.mark.parametrize("limit", [NAN, math.inf])
    def test_a_limit_that_is_no_number_is_refused(self, limit: float) -> None:
        with pytest.raises(errors.InputError, match="max_gain as a finite"):
            report(finding()).gate(max_gain=limit)


class TestRaiseIfLeaks:
    def test_a_verdict_raises_and_names_the_worst_finding(self) -> None:
        made = report(
            finding(verdict="leaks", level=30.0),
            finding(STACK, "leaks", 65.0, attack="position"),
            finding("none", "leaks", 104.0),
        )
        with pytest.raises(errors.LeakFound) as caught:
            made.raise_if_leaks()
        message = str(caught.value)
        assert STACK in message and "position" in message and "65.0 dB" in message
        assert "11.0 dB" in message  # what knowing nothing scores
        assert "1 more" in message

    def test_the_undefended_control_alone_does_not_raise(self) -> None:
        report(finding("none", "leaks", 104.0), finding()).raise_if_leaks()

    def test_a_nan_raises(self) -> None:
        with pytest.raises(errors.LeakFound):
            report(finding(level=NAN)).raise_if_leaks()

    def test_an_undecided_gate_names_the_configurations(self) -> None:
        with pytest.raises(errors.LeakFound, match=re.escape(STACK)):
            report(finding(), unmeasured("blocked", STACK)).raise_if_leaks(max_psnr=15.0)


class TestWords:
    def test_headline_names_batch_size_update_weights_and_families_not_run(self) -> None:
        made = report(
            finding(), batch_size=4, update="difference after 3 steps", weights="checkpoint w.pt"
        )
        for form in (made.headline(), made.to_markdown(), made.to_html(), console_text(made)):
            text = " ".join(form.replace("\\_", "_").split())
            for words in ("4", "difference after 3 steps", "checkpoint w.pt", "ladder, matching"):
                assert words in text

    def test_resisted_is_named_with_the_attacks_that_were_run(self) -> None:
        made = report(finding(), finding(attack="position"), unmeasured("blocked", attack="april"))
        assert "resisted the attacks that were run (span, position)" in made.outcome()

    def test_outcome_counts_each_configuration_once(self) -> None:
        made = report(
            finding(verdict="leaks", level=65.0),
            finding(verdict="resisted", attack="position"),
            finding(STACK, "resisted"),
            unmeasured("blocked", "encryption:select=all"),
        )
        assert made.outcome() == (
            "1 of 3 defended configurations leaks; 1 resisted the attacks that were run (span); "
            "1 was not tested, because every attack was blocked."
        )

    def test_without_defenses_the_outcome_says_so(self) -> None:
        assert "No defended configuration" in report(finding("none", "leaks")).outcome()

    def test_no_form_calls_anything_secure(self) -> None:
        made = full_report()
        for form in (made.to_markdown(), made.to_html(), made.to_json_text(), console_text(made)):
            text = re.sub(r"<style>.*?</style>|<meta.*?>", "", form, flags=re.S)
            assert not re.search(r"\b(secured?|safe|safely|protected)\b", text, re.I)

    def test_an_unknown_verdict_is_refused(self) -> None:
        refused = (errors.InputError, TypeCheckError)  # the second where types are checked
        with pytest.raises(refused, match="verdict"):
            finding(verdict="secure")
        with pytest.raises(refused, match="verdict"):
            Control("fine")  # type: ignore[arg-type]

    def test_pictures_of_another_shape_are_refused(self) -> None:
        with pytest.raises(errors.InputError, match="original of shape"):
            Pictures(torch.zeros(3, 8, 8))


def console_text(made: AuditReport, width: int = 80) -> str:
    buffer = io.StringIO()
    made.print_to(Console(file=buffer, width=width, highlight=False))
    return buffer.getvalue()


class TestConsole:
    def test_table_fits_80_columns(self) -> None:
        long = report(
            finding("positions:kind=sincos+" + "shuffle:ratio=0.7+" * 8 + "noise", "resisted"),
            unmeasured("not applicable", reason="because " * 40, attack="gradinversion"),
            finding(verdict="inconclusive", level=199.9, seconds=12345.67, identified=0.999),
        )
        lines = console_text(long).splitlines()
        assert max(map(len, lines)) <= 80
        assert len([line for line in lines if "gradinversion" in line]) == 1

    def test_every_finding_stands_on_one_line_with_its_numbers(self) -> None:
        text = console_text(full_report())
        row = next(line for line in text.splitlines() if "resisted  " in line)
        assert row.split() == ["span", "resisted", "12.0", "+1.0", "12.0", "2", "%", "0.80"]
        assert "pos_embed cannot be read" in text
        assert "3 % at epsilon 8/255" in text
        assert "11.0 dB matched-patch" in " ".join(text.split())

    def test_the_same_reason_of_an_attack_is_printed_once(self) -> None:
        twice = [unmeasured("blocked", d, reason="it is sealed") for d in (FIXED, STACK)]
        other = unmeasured("blocked", STACK, reason="it is sealed", attack="position")
        assert console_text(report(*twice)).count("it is sealed") == 1
        assert console_text(report(*twice, other)).count("it is sealed") == 2

    def test_what_a_verdict_does_not_mean_stands_at_each_of_them(self) -> None:
        twice = [finding(d, details={"exact": "no exact attack known"}) for d in (FIXED, STACK)]
        assert console_text(report(*twice)).count("that is not protection") == 2

    def test_columns_stay_aligned(self) -> None:
        lines = console_text(full_report()).splitlines()
        heading = next(line for line in lines if "verdict" in line)
        rows = [x for x in lines if re.match(r"  (span|position|fgsm) ", x)]
        assert len(rows) == 4
        assert {len(row.rstrip()) for row in rows} == {len(heading.rstrip())}

    def test_an_attack_with_a_long_name_keeps_the_columns_and_80_of_them(self) -> None:
        for name in ("third-party-inversion", "\u6f22" * 10, "x" * 200):
            lines = console_text(report(finding(attack=name, seconds=1.0))).splitlines()
            (at,) = (i for i, line in enumerate(lines) if "resisted  " in line)
            assert lines[at].split()[0] == "resisted" and len(lines[at]) == 76
            assert lines[at - 1].strip() and lines[at - 1].strip() in name
            assert max(map(len, lines)) <= 80

    def test_every_leak_says_why(self) -> None:
        twice = [finding(d, "leaks", reason="told from decoys") for d in (FIXED, STACK)]
        assert console_text(report(*twice)).count("told from decoys") == 2

    def test_no_line_ends_in_spaces(self) -> None:
        assert not re.search(r" $", console_text(full_report()), re.M)

    def test_an_undefended_run_with_withheld_tensors_is_not_called_the_control(self) -> None:
        text = console_text(report(finding("none", "leaks"), threat={"withheld": ["position"]}))
        assert "none (tensors withheld)" in text and "control" not in text

    def test_markup_in_names_is_printed_as_it_is(self) -> None:
        assert "[bold]x[/bold]" in console_text(report(finding("[bold]x[/bold]")))


class TestMarkdown:
    def test_table_has_one_row_per_finding(self) -> None:
        text = full_report().to_markdown()
        assert len(re.findall(r"^\| ", text, re.M)) == 1 + 4
        assert "| +1.0 |" in text

    def test_markup_is_escaped(self) -> None:
        text = report(finding("a|b<script>", reason="x_y_z\n# heading")).to_markdown()
        assert "a\\|b&lt;script>" in text
        assert "\n# heading" not in text


class TestHtml:
    def test_everything_is_escaped(self) -> None:
        evil = "<script>alert('x')</script>\"&"
        made = report(
            finding(
                evil,
                attack=evil,
                reason=evil,
                settings={evil: evil},
                details={evil: [evil]},
                robust_accuracy={evil: 0.5},
                images=replace(pictures(), names=(evil,)),
            ),
            model=ModelFacts(evil, 1),
            images=(evil,),
            weights=evil,
            update=evil,
            threat={evil: [evil]},
            families_not_run=(evil,),
            notes=(evil,),
            version=evil,
        )
        page = made.to_html()
        assert "<script" not in page
        assert "alert('x')" not in page
        assert page.count("&lt;script&gt;") > 10

    def test_page_loads_nothing_and_runs_nothing(self) -> None:
        page, count = re.subn(r'src="data:image/png;base64,[\w+/=]+"', "", full_report().to_html())
        assert count == 6
        assert not re.search(r"https?:|//|@import|url\(|src=|<script|<link|<iframe| on\w+=", page)

    def test_pictures_stand_side_by_side_with_a_text_for_each(self) -> None:
        page = full_report().to_html()
        for title in ("Original", "Control", "Reconstruction"):
            assert f'alt="{title} of image-0"' in page

    def test_verdicts_are_text_and_shape_not_colour_alone(self) -> None:
        page = full_report().to_html()
        for verdict in ("leaks", "resisted", "blocked", "not applicable", "inconclusive"):
            assert re.search(rf'class="badge [a-z-]+"><svg [^>]+>.+?</svg>{verdict}</span>', page)

    def test_images_shown_are_the_closest_reconstructions(self) -> None:
        many = finding(
            verdict="leaks",
            psnr=summary(*map(float, range(9))),
            patch_psnr=summary(*map(float, range(9))),
            images=pictures(count=9),
        )
        page = report(many).to_html()
        assert 'alt="Reconstruction of image-8"' in page
        assert "image-4" not in page
        assert "4 of 9 images" in page

    def test_names_that_are_no_unicode_are_written(self, tmp_path) -> None:
        made = report(finding(), images=("bad\udce9name\x00.png",))
        for suffix in ("html", "md", "json"):
            made.save(tmp_path / f"r.{suffix}")
        assert "bad\ufffdname\ufffd.png" in (tmp_path / "r.html").read_text("utf-8")

    def test_an_original_that_nobody_knows_is_not_shown(self) -> None:
        guess = pictures().reconstruction
        page = report(finding(verdict="leaks", images=Pictures(reconstruction=guess))).to_html()
        assert "not known</div>" in page
        assert "Original of" not in page

    def test_an_undefended_run_with_withheld_tensors_is_shown_beside_the_control(self) -> None:
        run = finding("none", "leaks", control=Control("leaks", summary(99.0)), images=pictures())
        assert 'alt="Control of' not in report(run).to_html()
        withheld = report(run, threat={"withheld": ["position"]}).to_html()
        assert 'alt="Control of' in withheld
        assert "tensors withheld" in withheld


def test_forms_that_show_images_are_for_their_owner_alone(tmp_path) -> None:
    made, before = full_report(), os.umask(0o022)
    try:
        for suffix, mode in {"json": 0o644, "md": 0o644, "html": 0o600, "png": 0o600}.items():
            made.save(tmp_path / f"r.{suffix}")
            assert stat.S_IMODE((tmp_path / f"r.{suffix}").stat().st_mode) == mode, suffix
    finally:
        os.umask(before)


class TestSave:
    def test_suffix_names_the_form(self, tmp_path) -> None:
        made = full_report()
        for suffix in ("json", "md", "html", "png"):
            made.save(tmp_path / f"r.{suffix}")
        assert json.loads((tmp_path / "r.json").read_text())["schema"] == 1
        assert (tmp_path / "r.md").read_text().startswith("# vitguard audit")
        assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
        assert Image.open(tmp_path / "r.png").format == "PNG"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json", "r.md", "r.png"]

    def test_another_suffix_and_an_unwritable_path_are_refused(self, tmp_path) -> None:
        with pytest.raises(errors.InputError, match=r"\.html"):
            full_report().save(tmp_path / "r.pdf")
        with pytest.raises(errors.InputError, match="writable"):
            full_report().save(tmp_path / "missing" / "r.json")

    def test_png_shows_the_reconstruction_pixel_by_pixel(self) -> None:
        shown = pictures()
        assert shown.reconstruction is not None
        sheet = full_report().to_png()
        colours = {colour for _, colour in sheet.getcolors(10**6) or []}
        for pixel in shown.reconstruction[0].flatten(1).T:
            assert tuple(round(255 * float(v)) for v in pixel) in colours

    def test_png_without_pictures_is_refused(self) -> None:
        with pytest.raises(errors.InputError, match="pictures"):
            report(finding()).to_png()


class TestTensorboard:
    def test_scalars_and_pictures_can_be_read_back(self, tmp_path) -> None:
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        full_report().to_tensorboard(tmp_path / "events", step=3)
        events = EventAccumulator(str(tmp_path / "events"), size_guidance={"images": 0})
        events.Reload()
        scalars = events.Tags()["scalars"]
        gain = next(tag for tag in scalars if tag.endswith("span/gain") and "shuffle" in tag)
        (event,) = events.Scalars(gain)
        assert (event.step, event.value) == (3, pytest.approx(1.0))
        assert sum(tag.endswith("reconstruction") for tag in events.Tags()["images"]) == 2

    def test_an_attack_with_two_settings_has_two_tags(self, tmp_path) -> None:
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        longer = replace(finding(), settings={"iterations": 400})
        report(finding(), longer).to_tensorboard(tmp_path / "events")
        events = EventAccumulator(str(tmp_path / "events")).Reload()
        tags = {tag.rpartition("/")[0] for tag in events.Tags()["scalars"]}
        assert tags == {f"audit/{longer.defense}/{longer.attack}{end}" for end in ("", "-2")}

    def test_without_tensorboard_the_error_names_the_extra(self, tmp_path, monkeypatch) -> None:
        import sys

        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(errors.MissingExtra, match=r"vitguard\[tensorboard\]"):
            full_report().to_tensorboard(tmp_path)

    def test_a_file_in_the_way_is_refused(self, tmp_path) -> None:
        pytest.importorskip("tensorboard", reason="tensorboard is not installed")
        (tmp_path / "file").write_text("")
        with pytest.raises(errors.InputError, match="folder"):
            full_report().to_tensorboard(tmp_path / "file")


@pytest.mark.slow
def test_importing_the_report_loads_no_optional_dependency() -> None:
    import subprocess
    import sys

    code = (
        "import sys, vitguard.report as r; "
        "print([m for m in ('tensorboard', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_sentence_of_a_gate_does_not_set_one_image_against_the_baseline_of_another():
    """Gain is of each image, the baseline the highest of all: they need not add up."""
    each = Summary.of([12.7, 24.5])
    found = Finding(
        "positions:kind=frozen", "span", "leaks", "12.8 dB above", patch_psnr=each, gain=12.8
    )
    report = AuditReport(
        ModelFacts("vit", 1), ("a", "b"), 1, Baseline(16.1, 16.3), (found,), "random", "a gradient"
    )
    with pytest.raises(errors.LeakFound, match=r"where knowing nothing scores at most 16\.3 dB"):
        report.raise_if_leaks()
