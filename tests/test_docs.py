import re
from pathlib import Path

import matplotlib
import nibabel as nib

DOCS = Path(__file__).parents[1] / "docs"


def test_the_demons_document_runs(brains, tmp_path, monkeypatch):
    matplotlib.use("Agg")
    for name, subject in (("fixed", "sub-000"), ("moving", "sub-001")):
        nib.save(nib.load(brains / f"{subject}_t1.nii.gz"), tmp_path / f"{name}.nii.gz")
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "demons.md").read_text()
    blocks, names = re.findall(r"```python\n(.*?)```", text, re.DOTALL), {}
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, "docs/demons.md", "exec"), names)
    figures = re.findall(r"!\[.*?\]\((\w+\.png)\)", text)
    assert len(figures) == 2
    for name in figures:
        assert (tmp_path / name).stat().st_size > 20_000 and (DOCS / name).exists()
    mine = names["mine"]
    assert float(names["jacobian_determinant"](mine.u).min()) > 0
    energies = mine.energies[-1]
    assert energies[0] > names["np"].nanmin(energies)
