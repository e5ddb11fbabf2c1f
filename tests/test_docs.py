import importlib
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import pytest

from drivenmorph_jax.registration.checks import LIMITS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md",
         *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("weights/*/README.md"))]
PROGRAMS = {"register": "register.md", "cohort": "cohort.md", "template": "template.md", "label": "label.md",
            "correct": "correct.md", "apply": "transforms.md", "train": "train.md", "eval": "evaluate.md"}


def blocks(page, language=""):
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for of, text in found if of == language]


def test_the_demons_document_runs(brains, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    for name, subject in (("fixed", "sub-000"), ("moving", "sub-001")):  # smaller, so with fewer voxels of 2 mm
        image = nib.load(brains / f"{subject}_t1.nii.gz")
        affine = np.diag([0.4, 0.4, 0.4, 1]) @ image.affine
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), affine), tmp_path / f"{name}.nii.gz")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "demons.md").read_text()
    code, names = blocks(DOCS / "demons.md", "python"), {}
    assert len(code) == 9
    for block in code:
        exec(compile(block, "docs/demons.md", "exec"), names)
    figures = re.findall(r"!\[.*?\]\((\w+\.png)\)", text)
    assert len(figures) == 2
    for name in figures:
        assert (tmp_path / name).stat().st_size > 20_000 and (DOCS / name).exists()
    mine = names["mine"]
    assert float(names["jacobian_determinant"](mine.u).min()) > 0
    energies = mine.energies[-1]
    assert energies[0] > names["np"].nanmin(energies)


def test_what_the_documents_import_exists():
    imported = set()
    for page in PAGES:
        for block in blocks(page, "python"):
            for module, names in re.findall(r"from (drivenmorph_jax\S*) import (\([^)]*\)|[^\n#]*)", block):
                imported |= {(module, name) for name in re.findall(r"\w+", names)}
    assert ("drivenmorph_jax", "register") in imported
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name), (module, name)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_page_of_a_program_has_its_flags_and_no_others(program):
    told = subprocess.run([sys.executable, f"{program}.py", "--help"], cwd=ROOT, capture_output=True, text=True).stdout
    flags = set(re.findall(r"--[a-z][\w-]*", told)) - {"--help", "--config"}
    page = (DOCS / PROGRAMS[program]).read_text()
    assert flags and not {flag for flag in flags if f"`{flag}" not in page}
    used = [re.findall(r"--[a-z][\w-]*", command) for page in PAGES for block in blocks(page)
            for command in re.findall(rf"drivenmorph {program} (.*(?:\\\n.*)*)", block)]
    assert used and set().union(*used) <= flags | {"--config"}


def test_links_of_the_documents_lead_to_files_of_the_project():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page.name, link)


def test_the_readme_is_short_and_lines_fit_a_screen():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
    for page in PAGES:
        for line in page.read_text().splitlines():
            assert len(line) <= 128 or line.strip().startswith("|"), (page.name, line)


def test_the_page_of_the_checks_has_each_with_its_limits():
    page = (DOCS / "checks.md").read_text()
    for name, (least, largest, sentence) in LIMITS.items():
        line, = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert sentence in line and all(f"{limit:g}" in line for limit in (least, largest)
                                        if limit != 0 and abs(limit) != float("inf"))
