"""What a user types is there, and importing it costs nothing that is not used."""

import subprocess
import sys

import pytest

import vitguard

HEAVY = (
    "opacus",
    "tenseal",
    "flwr",
    "transformers",
    "matplotlib",
    "tensorboard",
    "timm",
    "skimage",
)


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint('\\n'.join(m for m in sys.modules if '.' not in m))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_vitguard_loads_nothing_else_not_even_torch():
    assert not loaded_after("import vitguard; vitguard.__version__; dir(vitguard)") & {
        "torch",
        "numpy",
        *HEAVY,
    }


@pytest.mark.slow
def test_using_the_spine_loads_no_optional_dependency():
    names = (
        "Anatomy, FixedPositions, Guard, Normalization, Update, WithheldPositions, audit, protect"
    )
    found = loaded_after(f"from vitguard import {names}")
    assert "torch" in found
    assert not found & {"opacus", "tenseal", "flwr", "transformers", "matplotlib", "tensorboard"}


def test_every_name_in_all_is_there_and_is_called_that():
    assert list(vitguard.__all__) == sorted(set(vitguard.__all__))
    for name in vitguard.__all__:
        value = getattr(vitguard, name)
        assert value.__name__ == name and value.__doc__, name
        assert name in dir(vitguard)


def test_all_names_what_is_public_and_nothing_more():
    public = {n for n in dir(vitguard) if n.isidentifier() and not n.startswith("_")}
    modules = {n for n in public if f"vitguard.{n}" in sys.modules}
    plain = {"annotations", "sys", "import_module", "Any", "ModuleType", "TYPE_CHECKING"}
    assert public - modules - plain == set(vitguard.__all__) - modules


def test_a_module_of_the_same_name_does_not_take_the_functions_place():
    import vitguard.audit

    assert callable(vitguard.audit)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PatchShuffel"):
        _ = vitguard.PatchShuffel


def test_every_name_that_a_module_of_the_spine_lists_is_there():
    import importlib

    for module in (
        "core", "errors", "vit", "guard", "threats", "audit", "models", "registry",
        "audit.verdicts",
        "defenses.base", "defenses.positions", "defenses.noise", "defenses.pruning",
        "attacks.base", "attacks.equations.rows", "attacks.span.smooth",
        "attacks.position", "attacks.span",
        "attacks.april", "attacks.labels", "testing.contracts",
    ):  # fmt: skip
        found = importlib.import_module(f"vitguard.{module}")
        assert set(found.__all__) <= set(vars(found)), module
