import csv

import numpy as np
import pytest
from matplotlib import image
from scipy import ndimage

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.evaluation import metrics
from drivenmorph_jax.evaluation.figures import _without_side, curves, dice_boxplot, overview
from drivenmorph_jax.evaluation.tables import LABELS, markdown_table, pairs_csv, report_md


def blob_pair(shape, spacing, amplitude=1.0):
    """A fixed and a moving ellipsoid with some texture, and a smooth field between them."""
    rng = np.random.default_rng(0)
    x = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"), axis=-1)
    brain = np.sum((x / 0.8) ** 2, axis=-1) < 1
    moving = brain * (0.6 + 0.2 * np.sin(9 * x[..., 0]) * np.cos(7 * x[..., 1] + 3 * x[..., 2]))
    u = np.stack([ndimage.gaussian_filter(rng.normal(size=shape), 4) for _ in range(3)], axis=-1)
    u *= amplitude / u.std()
    positions = np.moveaxis(np.stack(np.indices(shape), axis=-1) + u, -1, 0)
    warped = ndimage.map_coordinates(moving, positions, order=1)
    return {"fixed": warped + 0.02 * brain, "moving": moving, "warped": warped, "u": u, "force": 0.5 * u,
            "jac": metrics.jacobian(u), "spacing": spacing}


@pytest.mark.parametrize(("shape", "spacing"), [((40, 48, 36), (2, 2, 2)), ((30, 64, 20), (4, 2, 5))])
def test_overview_is_a_picture_of_its_page(tmp_path, shape, spacing):
    pair = blob_pair(shape, spacing)
    labels = (pair["fixed"] > 0.3).astype(int) + (pair["fixed"] > 0.6)
    overview(tmp_path / "new" / "pair.png", **pair, title="a → b\nDice 0.5", labels=labels)
    pixels = image.imread(tmp_path / "new" / "pair.png")
    assert 1900 < pixels.shape[1] < 2200 and 1000 < pixels.shape[0] < 3000
    # Black tiles on a white page, and colour in them.
    assert 0.2 < np.mean(pixels[..., :3].max(axis=-1) < 0.05) < 0.9
    assert np.mean(np.ptp(pixels[..., :3], axis=-1) > 0.2) > 0.02
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["pair.png"]


def test_overview_marks_folding_and_takes_trailing_channels_and_a_full_jacobian(tmp_path):
    pair = blob_pair((32, 32, 32), (1.0, 1.0, 1.0))
    for name in ("fixed", "moving", "warped"):
        pair[name] = pair[name][..., None]
    pair["jac"] = np.ones((32, 32, 32))
    yellow = np.array([0xF0, 0xE4, 0x42]) / 255
    found = []
    for value in (0.5, -0.5):
        pair["jac"][12:20, 12:20, 12:20] = value
        overview(tmp_path / "pair.png", **pair)
        pixels = image.imread(tmp_path / "pair.png")[..., :3]
        found.append(np.sum(np.all(np.abs(pixels - yellow) < 0.01, axis=-1)))
    assert found[0] == 0 and found[1] > 1000


def test_differences_are_those_of_the_matched_values(tmp_path):
    pair, coloured = blob_pair((32, 32, 32), (1.0, 1.0, 1.0)), []
    pair |= {"u": np.zeros_like(pair["u"]), "force": np.zeros_like(pair["u"])}
    negative = {name: np.where(pair[name] > 0, 1 - pair[name], 0) for name in ("moving", "warped")}
    for matched in (None, (pair["fixed"], pair["fixed"])):
        overview(tmp_path / "pair.png", **pair | negative, matched=matched)
        pixels = image.imread(tmp_path / "pair.png")[..., :3]
        coloured.append(np.mean((pixels[..., 0] > pixels[..., 2] + 0.3) & (pixels[..., 0] > 0.5)))  # inferno's light
    assert coloured[1] < 0.5 * coloured[0]


def test_the_front_of_the_brain_is_drawn_at_the_top_and_its_right_on_the_right(tmp_path):
    pair = blob_pair((32, 32, 32), (1.0, 1.0, 1.0))
    zero = {"u": np.zeros_like(pair["u"]), "force": np.zeros_like(pair["u"]), "jac": np.ones((32, 32, 32))}
    fixed = np.full((32, 32, 32), 0.3)
    fixed[16:, 16:, :] = 1.0  # right and anterior
    overview(tmp_path / "pair.png", fixed, fixed, fixed, **zero, spacing=(1, 1, 1))
    pixels = image.imread(tmp_path / "pair.png")[..., 0]
    left, top, tile = int(0.36 * 150), int(0.42 * 150), int(2.2 * 150)
    axial = pixels[top:top + tile, left:left + tile]
    quarter, three = tile // 4, 3 * tile // 4
    assert axial[quarter, three] > 0.9
    assert max(axial[quarter, quarter], axial[three, three], axial[three, quarter]) < 0.5


def test_curves_with_and_without_validation(tmp_path):
    rows = [{"step": step, "loss": np.exp(-step / 50)} for step in range(200)]
    curves(tmp_path / "loss.png", rows)
    rows[100]["val_dice"], rows[150]["val_dice"], rows[199]["val_dice"] = 0.4, float("nan"), 0.6
    curves(tmp_path / "both.png", rows)
    one, two = (image.imread(tmp_path / name).shape for name in ("loss.png", "both.png"))
    assert one[0] == two[0] > 300 and two[1] == 2 * one[1]


def test_dice_boxplot_merges_the_sides_of_many_structures(tmp_path):
    rng = np.random.default_rng(0)
    before = {label: rng.uniform(0.2, 0.5, 6) for label in range(1, 41)}
    after = {label: values + 0.3 for label, values in before.items()}
    names = {label: f"{'Left' if label % 2 else 'Right'}-Area{(label + 1) // 2}" for label in before}
    after[41], names[41] = [float("nan")], "Nowhere"
    dice_boxplot(tmp_path / "merged.png", before, after, names)
    first, then = ({label: x[label] for label in range(1, 21)} for x in (before, after))
    dice_boxplot(tmp_path / "twenty.png", first, then, names)
    dice_boxplot(tmp_path / "numbers.png", before, after)
    merged, twenty, numbers = (image.imread(tmp_path / f"{name}.png").shape[0]
                               for name in ("merged", "twenty", "numbers"))
    assert merged == twenty  # 40 in 20 pairs of sides, and 20 as they are
    assert numbers - twenty == pytest.approx(10 * 0.3 * 150, abs=1)  # 30 of the 40 without names


@pytest.mark.parametrize(("name", "bare"), [
    ("Left-Hippocampus", "Hippocampus"), ("Right Ventral DC", "Ventral DC"), ("ctx-lh-insula", "ctx insula"),
    ("amygdala_rh", "amygdala"), ("Bright spot", "Bright spot"), ("Left", "Left")])
def test_name_without_side(name, bare):
    assert _without_side(name) == bare


def test_pairs_csv_reads_back(tmp_path):
    rows = [{"pair": "a, b", "dice": 0.5}, {"pair": "c", "dice": 0.25, "hd95": 2.0}]
    pairs_csv(tmp_path / "pairs.csv", rows)
    with open(tmp_path / "pairs.csv", newline="") as file:
        assert list(csv.DictReader(file)) == [{"pair": "a, b", "dice": "0.5", "hd95": ""},
                                              {"pair": "c", "dice": "0.25", "hd95": "2.0"}]


def test_markdown_table():
    summary = {"dice": {"mean": 0.71234, "std": 0.02}, "own": {"mean": 3.0, "std": 1.0}}
    assert markdown_table(summary) == (
        "| Metric | Mean | Std |\n| --- | ---: | ---: |\n| Dice | 0.7123 | 0.02 |\n| own | 3 | 1 |\n")


def test_every_metric_has_a_name_in_tables():
    assert set(LABELS) == set(metrics.DEFINITIONS) - {"brain"}  # which is no metric


def test_report_md_links_figures_and_defines_its_numbers(tmp_path):
    rows = [{"pair": "a_b", "dice": 0.7}, {"pair": "b_a", "dice": 0.75}]
    (tmp_path / "figures").mkdir()
    report_md(tmp_path / "report.md", metrics.summarise(rows), rows,
                     {"First pair": tmp_path / "figures" / "first pair.png"}, "| level 1 | 0.5 |\n")
    text = (tmp_path / "report.md").read_text()
    assert "![First pair](<figures/first pair.png>)" in text
    assert "| Dice | 0.725 | 0.025 |" in text
    assert metrics.DEFINITIONS["dice"] in text and metrics.DEFINITIONS["hd95"] not in text
    assert "| b_a | 0.75 |" in text and "| level 1 | 0.5 |" in text


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "pairs.csv"
    pairs_csv(path, [{"pair": "old"}])

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(InputError, match="pairs.csv cannot be written"):
        pairs_csv(path, [{"pair": "new"}])
    assert path.read_text() == "pair\nold\n"
    assert list(tmp_path.iterdir()) == [path]
