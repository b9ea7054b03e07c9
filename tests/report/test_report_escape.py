"""Nothing in a report can become markup, whichever of its fields holds it."""

from __future__ import annotations

import dataclasses
import io
import json
import types
import typing
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from vitguard.report import AuditReport, Finding, ModelFacts, Verdict

EVIL = (
    "<script>alert(1)</script> <img src=x onerror=alert(1)> \" onload=\"alert(1) ' onclick='x"
    " {{7*7}} {% raw %} {# x #} </style> --> &lt;b&gt; ]]>"
)
SEEN_IN_DETAILS = {  # what an attack reports under these names is told in a sentence
    "rung": "{}",
    "schedule": "cut {}",
    "exact": "no exact {}",
}


class Filled:
    """Builds a report from its type hints alone: a new field of text is filled as well."""

    def __init__(self, text: str) -> None:
        self.text, self.paths = text, []

    def string(self, path: str) -> str:
        self.paths.append(path)
        return f"{path}: {self.text}"

    def value(self, hint: Any, path: str) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Verdict:
            return "leaks"
        if hint is str:
            return self.string(path)
        if hint is bool:
            return True
        if hint in (int, float):
            return hint(3)
        if hint is torch.Tensor:
            shape = (3, 4, 4) if "examples" in path else (1, 3, 4, 4)
            return torch.full(shape, 0.5)
        if origin in (typing.Union, types.UnionType):
            (first, *_) = (a for a in arguments if a is not type(None))
            return self.value(first, path)
        if origin is tuple:
            if arguments[-1] is Ellipsis:
                return (self.value(arguments[0], path),)
            return tuple(self.value(a, path) for a in arguments)
        if origin is Mapping:
            return self.mapping(arguments[1], path)
        if dataclasses.is_dataclass(hint):
            return self.record(hint, path)
        pytest.fail(f"{path} has the type {hint}: tell this test how to put text into it")

    def mapping(self, inner: Any, path: str) -> dict[str, Any]:
        key = self.string(f"{path}-key")
        if inner is float:
            return {key: 0.5}
        made: dict[str, Any] = {key: [self.string(f"{path}-list"), 1.5]}
        made["text"] = self.string(f"{path}-text")
        if path.endswith("details"):
            made |= {k: v.format(self.string(f"{path}-{k}")) for k, v in SEEN_IN_DETAILS.items()}
            made |= {"verified": 0.5, "reconstruction_bound": 0.5, "reconstruction_prior": 0.1}
        if path.endswith("settings"):
            made |= {"targeted": True, "surrogate": self.string(f"{path}-surrogate")}
        return made

    def record(self, kind: Any, path: str = "") -> Any:
        hints = get_type_hints(kind)
        names = [f.name for f in dataclasses.fields(kind)]
        return kind(**{n: self.value(hints[n], f"{path}.{n}") for n in names})

    def report(self) -> AuditReport:
        made = self.record(AuditReport)
        (found,) = made.findings
        alone = dataclasses.replace(found, defense="none")
        rest = [dataclasses.replace(found, verdict=v) for v in get_args(Verdict)]
        return dataclasses.replace(made, findings=(alone, *rest))


class Page(HTMLParser):
    """The tags of a page with their attributes, and the text a reader can see."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        self.shown = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_comment(self, data: str) -> None:
        pytest.fail(f"a comment in the page: {data}")

    def skeleton(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the tags, but for `wbr`: a line may break where a text says."""
        return [(tag, tuple(attributes)) for tag, attributes in self.tags if tag != "wbr"]


def harmless(page: str) -> Page:
    parsed = Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form", "a")
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} {name}"
            assert name not in ("href", "srcdoc", "action", "background")
            if name == "src":
                assert (value or "").startswith("data:image/png;base64,")
            if name == "style":
                assert "alert" not in (value or "")
    assert [t for t, _ in parsed.tags].count("style") == 1
    return parsed


def forms(report: AuditReport) -> Iterator[tuple[str, str]]:
    buffer = io.StringIO()
    report.print_to(Console(file=buffer, width=80, force_terminal=False))
    yield "console", buffer.getvalue()
    yield "markdown", report.to_markdown()
    yield "html", report.to_html()


def test_text_in_any_field_of_a_report_is_shown_as_text_and_never_as_markup():
    filled = Filled(EVIL)
    parsed = harmless(filled.report().to_html())
    heard = parsed.shown + " ".join(v or "" for _, a in parsed.tags for v in a.values())
    assert len(filled.paths) > 20
    for path in set(filled.paths):
        written = f"{path}: {EVIL}"
        if path.endswith("-list"):  # a value with parts is shown as JSON
            written = json.dumps(written)[1:-1] if ".findings." in path else written
        assert written in heard, f"{path} is not shown as it was written"
    assert "49" not in parsed.shown


@pytest.mark.parametrize(
    "path", ["batch_size", "seed", "model.patches", "model.width", "model.parameters", "decoys"]
)
def test_text_where_a_number_should_stand_is_refused_or_shown_as_text(path: str):
    report = Filled("plain").report()
    holders = {"model": [report.model], "decoys": list(report.findings)}
    for holder in holders.get(path.partition(".")[0], [report]):
        object.__setattr__(holder, path.rpartition(".")[2], EVIL)
    try:
        page = report.to_html()
    except (TypeError, ValueError):
        return
    harmless(page)


PLAIN = Page(Filled("plain").report().to_html()).skeleton()


@settings(max_examples=40, deadline=None)
@given(
    st.text(alphabet="<>&\"'={}%#/!-`;: abonscript\x00\x1b\u2028\ud800", min_size=1)
    | st.text(st.characters(), min_size=1)
)
@pytest.mark.slow
def test_the_tags_of_the_page_do_not_depend_on_any_text_in_it(text: str):
    assert harmless(Filled(text).report().to_html()).skeleton() == PLAIN


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Lu"]), min_size=1))
def test_no_form_lets_a_control_character_through(text: str):
    for form, written in forms(Filled(f"{text}\x1b]0;title\x07\x1b[2J").report()):
        inside = [c for c in written if not c.isprintable() and c not in "\n\u202f\u200a\xad"]
        assert not inside, form


def test_markup_in_any_field_stays_text_in_markdown():
    lines = Filled(f"# | {EVIL} `code` [a](http://b) **c**").report().to_markdown()
    assert "<script" not in lines and "<img" not in lines
    table = [line for line in lines.splitlines() if line.startswith("| ")]
    cells = {len(line.replace("\\|", "").strip("|").split("|")) for line in table}
    assert cells == {9}


def test_a_report_has_fields_of_text_in_these_places():
    filled = Filled("x")
    filled.report()
    expected = {".model.name", ".findings.defense", ".findings.attack", ".findings.reason"}
    expected |= {".images", ".weights", ".update", ".notes", ".version", ".families_not_run"}
    expected |= {".findings.images.names", ".findings.settings-key", ".threat-list"}
    assert expected <= set(filled.paths)
    assert {f.name for f in dataclasses.fields(ModelFacts)} == {
        "name", "parameters", "patches", "width"
    }  # fmt: skip
    assert isinstance(filled.report().findings[0], Finding)
