"""The page of a result and of a cohort in a browser: Chromium without a screen, where it is installed.

`make pictures` draws the pictures of docs/view.md by `test_the_tour`.
"""

import io
import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy.ndimage import binary_erosion
from scipy.spatial.transform import Rotation
from test_view import AFFINE, SWOLLEN, Quick, folder, quick, result, serving, told  # noqa: F401, fixtures among them
from test_view import cohort as cohort_folder  # noqa: F401

from drivenmorph_jax.registration import decisions
from drivenmorph_jax.registration.cohort_report import COLUMNS
from drivenmorph_jax.registration.history import HISTORY
from drivenmorph_jax.view import server, steering

FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
         "--disable-angle-features=warmUpPipelineCacheAtLink"]  # a third less work for a page
WAIT = 60_000  # ms


@pytest.fixture(scope="module")
def chromium():
    """Chromium, or a reason to skip."""
    if find_spec("ipyniivue") is None:
        pytest.skip("ipyniivue, which carries NiiVue, is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None or find_spec("playwright") is None:
        pytest.skip("a Chromium and the package playwright are not installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=found, args=FLAGS)
        yield one
        one.close()


@pytest.fixture
def tab(chromium):
    """A tab that fails where the page has an error or asks for something from elsewhere."""
    from playwright.sync_api import expect
    expect.set_options(timeout=WAIT)
    page, asked, faults = chromium.new_page(viewport={"width": 1000, "height": 700}), [], []
    page.set_default_timeout(WAIT)
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    yield page
    page.close()
    faults = [fault for fault in faults if "net::ERR_CONNECTION" not in fault]  # a server that a test ends
    assert not faults and asked and all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in asked)


def says(page, place, text):
    from playwright.sync_api import expect
    expect(page.locator(place)).to_contain_text(text)


def load(page, address, able=True):
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    if able:
        page.wait_for_selector("#add:enabled")


def reaches(page, at):
    """Wait until the page shows the state after `at` corrections."""
    page.wait_for_selector(f"body[data-at='{at}']")


def click(page, panel, x, y, count=1):
    """Click at a part of the width and the height of a panel."""
    box = page.locator(f"#{panel} canvas").bounding_box()
    page.mouse.click(box["x"] + x * box["width"], box["y"] + y * box["height"], click_count=count)


def inside(page, what):
    """What a script of the page's own modules returns."""
    return page.evaluate(f"import('./panels.js').then(({{ go, place, views }}) => {what})")


def place(page):
    return np.array(inside(page, "place()"))


def painted(page, panel="fixed"):
    """The number of painted voxels of a panel."""
    return inside(page, f"views.{panel}.drawBitmap?.reduce((sum, x) => sum + (x > 0), 0) ?? 0")


def test_images_maps_and_checks(folder, tab):  # noqa: F811
    with serving(steering.ResultPage(folder / "out")) as one:
        load(tab, one.address, able=False)
        assert tab.title() == "moving.nii.gz to fixed.nii.gz"
        says(tab, "#said", "The result can be looked at only.")
        assert "<b>Range</b>." in tab.inner_text("#checks") and "<i>two" in tab.inner_text("#landmarks")
        tab.locator("#checks button").first.click()  # of the check "stretch"
        x, y, z = nib.affines.apply_affine(AFFINE, SWOLLEN)
        here = f"{'RL'[int(x < 0)]} {abs(x):.1f}, {'AP'[int(y < 0)]} {abs(y):.1f}, {'SI'[int(z < 0)]} {abs(z):.1f} mm"
        assert tab.inner_text("#status").startswith(here)
        tab.select_option("#overlay", "jacobian")
        says(tab, "#status", "jacobian determinant 4.00")
        assert tab.inner_text("#legend").split()[:5] == ["1/4", "1/2", "1", "2", "4"]
        tab.check("#labels")
        says(tab, "#legend", "Label outlines")
        tab.select_option("#overlay", "displacement")
        says(tab, "#status", "displacement 3.00 mm")
        assert "Displacement (mm)" in tab.inner_text("#legend")
        for mode, visible in (("swipe", False), ("blink", False), ("side", True)):
            tab.select_option("#mode", mode)
            assert tab.is_visible("#moving") == visible and tab.is_visible("#swipe") == (mode == "swipe")
        for width in (1280, 390):  # nothing is cut off, and every panel has its place
            tab.set_viewport_size({"width": width, "height": 700})
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            boxes = [tab.locator(f"#{name} canvas").bounding_box() for name in ("fixed", "warped", "moving")]
            assert all(box["x"] >= 0 and box["x"] + box["width"] <= width and box["width"] > 300 for box in boxes)
            assert len({(box["x"], box["y"]) for box in boxes}) == 3


def test_a_click_in_an_oblique_image_moves_all_crosshairs_to_its_place(folder, tab, tmp_path):  # noqa: F811
    """NiiVue has other millimetres beside those of the world there."""
    turn = from_matvec(Rotation.from_euler("xyz", [20, -15, 30], degrees=True).as_matrix())
    copy = shutil.copytree(folder, tmp_path / "oblique")
    for path in copy.rglob("*.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), turn @ image.affine, image.header), path)
    summary = json.loads((copy / "out" / "summary.json").read_text())
    (copy / "out" / "summary.json").write_text(json.dumps(summary | {
        role: str(copy / f"{role}.nii.gz") for role in ("fixed", "moving")}))
    with serving(steering.ResultPage(copy / "out")) as one:
        load(tab, one.address, able=False)
        click(tab, "fixed", 0.2, 0.3)
        fixed, warped = (np.array(inside(tab, f"Array.from(views.{name}.scene.crosshairPos)")) for name in (
            "fixed", "warped"))
        np.testing.assert_allclose(warped, fixed, atol=1e-3)
        affine = nib.Nifti1Image.from_bytes(one.page.shown.file("fixed")).affine
        voxel = nib.affines.apply_affine(np.linalg.inv(affine), place(tab))
        shape = np.array([side.stop - side.start for side in one.page.shown.box])
        frac = (voxel + 0.5) / shape  # along the axes of the file, of which the first is turned round
        np.testing.assert_allclose([1 - frac[0], *frac[1:]], fixed, atol=1e-3)


def test_a_correction_by_mouse_in_two_tabs_and_after_a_restart(result, tab, chromium):  # noqa: F811
    from playwright.sync_api import expect
    with serving(steering.ResultPage(result)) as one:
        load(tab, one.address)
        tab.click("#add")
        says(tab, "#said", "Click on a structure in the fixed image.")
        click(tab, "warped", 0.2, 0.3)
        says(tab, "#said", "Click in the fixed image first.")
        click(tab, "fixed", 0.97, 0.97)
        says(tab, "#said", "Click on an image, not beside it.")
        click(tab, "fixed", 0.2, 0.3)
        says(tab, "#said", "Now click on the same structure")
        fixed = place(tab)
        click(tab, "moving", 0.24, 0.32, count=2)  # a double click is one place
        says(tab, "#said", "landmark 1 is added")
        assert not tab.get_by_label("Name of landmark 2").count()
        moving = one.page.act("point", {"panel": "moving", "place": place(tab).tolist()})["moving"]
        for panel, spot in (("fixed", (0.2, 0.3)), ("moving", (0.24, 0.32))):  # its mark is where the click was
            box, *boxes = (found.bounding_box() for found in tab.locator(f"#{panel} :is(canvas, .marks span)").all())
            assert min(max(abs(mark[axis] + mark[side] / 2 - box[axis] - share * box[side]) for axis, side, share in (
                ("x", "width", spot[0]), ("y", "height", spot[1]))) for mark in boxes) < 3
        assert tab.locator("#warped .marks .asked").count()  # dashed: not computed yet
        tab.get_by_label("Radius of landmark 1 in mm").fill("7")
        tab.click("#paint")
        box = tab.locator("#fixed canvas").bounding_box()
        spots = [(box["x"] + x * box["width"], box["y"] + 0.25 * box["height"]) for x in (0.6, 0.7)]
        tab.mouse.move(*spots[0])
        tab.mouse.down()
        tab.mouse.move(*spots[1], steps=4)
        tab.mouse.up()
        number, last = painted(tab), place(tab)
        assert number > 100 and painted(tab, "warped") == number
        tab.wait_for_selector("body[data-drafted='4']")  # the landmark, its radius, the paint
        tab.reload()
        tab.wait_for_selector("#add:enabled")
        tab.wait_for_selector("body[data-drafted='4']")
        assert painted(tab) == number and tab.get_by_label("Radius of landmark 1 in mm").input_value() == "7"
        tab.click("#go")
        reaches(tab, 1)
        says(tab, "#history", "1 (shown): 1 landmark, not to be trusted where painted; similarity there 0.250 before")
        asked = one.page._history.current.correction
        np.testing.assert_allclose(asked.landmarks.fixed[0], fixed, atol=1e-3)
        np.testing.assert_allclose(asked.landmarks.moving[0], moving, atol=1e-3)
        assert asked.landmarks.radius.tolist() == [7] and asked.distrust.sum() == number
        assert asked.distrust[tuple(np.rint(nib.affines.apply_affine(np.linalg.inv(AFFINE), last)).astype(int))]
        assert tab.locator("#fixed .marks span").count() and not tab.locator("#fixed .marks .asked").count()
        says(tab, "#checks", "Of the result before the correction.")
        assert not re.findall(r"\b([a-z]+) \1\b", tab.inner_text("body"))  # no word stands twice
        says(tab, "#status", "before")  # the old result beside the new one
        value, before = (float(tab.inner_text("#status").split(f"{name} ")[1].split(",")[0])
                         for name in ("warped", "before"))
        assert value == pytest.approx(2 * before, rel=1e-2)
        other = chromium.new_page()  # a second tab shows the same
        load(other, one.address)
        reaches(other, 1)
        assert painted(other) == number
        other.click("#undo")
        reaches(tab, 0)
        assert tab.is_enabled("#redo") and tab.is_disabled("#undo") and painted(tab) == 0
        tab.keyboard.press("r")
        reaches(other, 1)
        tab.get_by_label("Weight of landmark 1").fill("0.5")
        tab.keyboard.press("Tab")
        expect(other.get_by_label("Weight of landmark 1")).to_have_value("0.5")
        assert tab.evaluate("document.activeElement.ariaLabel") == "Show landmark 1"  # where Tab went
        other.close()
        tab.click("#export")
        says(tab, "#said", f"All files are in {result}-corrected")
        assert (result.parent / "result-corrected" / HISTORY).is_file()
    says(tab, "#status", "The program has ended.")
    assert all(tab.is_disabled(f"#{name}") for name in ("add", "go", "undo", "export"))
    with serving(steering.ResultPage(result)) as one:
        load(tab, one.address)
        reaches(tab, 1)
        assert painted(tab) == number and tab.get_by_label("Weight of landmark 1").input_value() == "0.5"
        (result / "summary.json").write_text((result / "summary.json").read_text().replace("demons", "drivenmorph"))
        tab.click("#go")
        says(tab, "#said", "holds another result than it did when it was opened")


def test_the_keyboard_alone(result, tab):  # noqa: F811
    with serving(steering.ResultPage(result)) as one:
        load(tab, one.address)

        def focus(panel):
            for _ in range(40):
                if tab.evaluate(f"document.activeElement === document.querySelector('#{panel} canvas')"):
                    break
                tab.keyboard.press("Tab")
            assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # it is seen where

        focus("fixed")
        start = place(tab)
        for key in ("ArrowRight", "ArrowUp", "Shift+ArrowUp", "PageUp", "PageUp"):
            tab.keyboard.press(key)
        np.testing.assert_allclose(place(tab) - start, [1, 2, 6], atol=1e-3)
        fixed = place(tab)
        tab.keyboard.press("l")
        focus("warped")
        tab.keyboard.press("ArrowLeft")
        assert np.allclose(place(tab), fixed - [1, 0, 0], atol=1e-3)
        tab.keyboard.press("l")
        says(tab, "#said", "landmark 1 is added")
        tab.keyboard.press("d")
        number = painted(tab)
        assert number == pytest.approx(4 / 3 * np.pi * 6**3 / 8, rel=0.1)  # a ball of 6 mm, of voxels of 8 mm³
        tab.wait_for_selector("body[data-drafted='3']")  # opened, the landmark, the ball
        tab.keyboard.press("u")  # what is not computed yet is dropped
        tab.wait_for_selector("body[data-drafted='4']")
        assert painted(tab) == 0 and not tab.get_by_label("Name of landmark 1").count()
        tab.keyboard.press("r")
        tab.wait_for_selector("body[data-drafted='5']")
        assert painted(tab) == number and tab.get_by_label("Name of landmark 1").count()
        tab.keyboard.press("Shift+D")
        assert painted(tab) == 0
        tab.keyboard.press("g")
        says(tab, "#history", "1 (shown): 1 landmark;")
        reaches(tab, 1)  # what is told comes before it is drawn
        mark = one.page._history.current.correction.landmarks
        np.testing.assert_allclose(mark.fixed[0], fixed, atol=1e-3)
        tab.keyboard.press("u")
        reaches(tab, 0)
        tab.keyboard.press("r")
        reaches(tab, 1)


def test_a_cohort(cohort_folder, quick, tab):  # noqa: F811
    with serving(server.opened(cohort_folder)) as one:
        tab.goto(one.address)
        tab.wait_for_selector("#rows table")
        assert tab.inner_text("#rows tr:nth-child(2)").startswith("broken\tfailed")
        tab.get_by_label("Decision on good").select_option("accept")
        tab.get_by_label("Note on good").fill('fine, "so far"')
        tab.keyboard.press("Tab")
        says(tab, "#status", "4 pairs, 1 decided")
        tab.click("text=<b>bad")
        tab.wait_for_selector("body[data-ready]")
        tab.get_by_label("Decision on <b>bad").select_option("redo")
        says(tab, "#pair", "kept in cohort.csv")
        tab.click("text=Next pair")
        tab.wait_for_selector("body[data-ready]")
        assert tab.get_by_label("Note on good").input_value() == 'fine, "so far"'
        tab.click("text=All pairs")
        says(tab, "#status", "4 pairs, 2 decided")
        found = decisions.decisions(cohort_folder)
    assert found["good"] == {"decision": "accept", "note": 'fine, "so far"'} and found["<b>bad"]["decision"] == "redo"


PICTURES = os.environ.get("PICTURES")


@pytest.mark.skipif(not PICTURES, reason="draws the pictures of docs/view.md: make pictures")
def test_the_tour(tab, tmp_path):
    """What docs/view.md tells, with a real registration and a real correction of two brains of the embedded cohort."""
    from PIL import Image

    from drivenmorph_jax.data.cohort import embedded_cohort, true_displacement
    from drivenmorph_jax.registration.register import register
    from drivenmorph_jax.runtime.configuration import load as configuration

    def picture(name, height):
        tab.mouse.move(0, 0)
        tab.evaluate("document.activeElement.blur()")
        tab.wait_for_timeout(1500)
        shot = Image.open(io.BytesIO(tab.screenshot(clip={"x": 0, "y": 0, "width": 1280, "height": height})))
        shot.convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
            Path(PICTURES) / name, optimize=True)

    def landmark(panel, mm):
        tab.locator(f"#{panel} canvas").focus()
        inside(tab, f"go({mm.tolist()})")
        tab.keyboard.press("l")

    tab.set_viewport_size({"width": 1280, "height": 820})

    config = configuration("default").data
    config.num_test = 2
    subjects = embedded_cohort(config, ("test",)).test
    for name, subject in zip(("fixed", "moving"), subjects, strict=True):
        nib.save(nib.Nifti1Image((1000 * subject.image).astype(np.int16), subject.affine), tmp_path / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(subject.labels.astype(np.int16), subject.affine), tmp_path / f"{name}_seg.nii.gz")
    out = tmp_path / "cohort" / "sub-01"
    register(tmp_path / "fixed.nii.gz", tmp_path / "moving.nii.gz", moving_labels=tmp_path / "moving_seg.nii.gz",
             method="demons", force="intensity", quiet=True).save(out)
    with serving(steering.ResultPage(out)) as one:
        load(tab, one.address)
        tab.select_option("#overlay", "jacobian")
        says(tab, "#legend", "Jacobian determinant")
        picture("view_result.png", 700)
        tab.select_option("#overlay", "")
        # A landmark where the result is 7 mm from the truth: x in the fixed image, and w in the warped one.
        shown, total = one.page.shown, one.page._session.first.displacement
        truth = config.spacing * true_displacement(*subjects)
        near = binary_erosion(shown.brain, iterations=6) & (np.linalg.norm(truth - total, axis=-1) < 7)
        x = np.unravel_index(np.where(near, np.linalg.norm(truth - total, axis=-1), 0).argmax(), shown.brain.shape)
        points = nib.affines.apply_affine(subjects[0].affine, np.moveaxis(np.indices(shown.brain.shape), 0, -1))
        w = np.linalg.norm(points + total - points[x] - truth[x], axis=-1).argmin()
        landmark("fixed", points[x])
        landmark("warped", points.reshape(-1, 3)[w])
        says(tab, "#landmarks", "delete")
        tab.click("#paint")
        box = tab.locator("#fixed canvas").bounding_box()
        tab.mouse.move(box["x"] + 0.36 * box["width"], box["y"] + 0.62 * box["height"])
        tab.mouse.down()
        tab.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.66 * box["height"], steps=6)
        tab.mouse.up()
        tab.click("#paint")
        picture("view_correct.png", 790)
        tab.click("#go")
        tab.wait_for_selector("body[data-at='1']", timeout=600_000)
        tab.get_by_label("Show landmark 1").click()
        picture("view_corrected.png", 820)
    for name in ("sub-02", "sub-03"):
        shutil.copytree(out, out.parent / name)
    decisions.write_table(out.parent, COLUMNS, [
        {"name": "sub-01", "status": "done", "similarity_before": 0.31, "similarity_after": 0.52, "fold_pct": 0,
         "warnings": 0, "decision": "accept"},
        {"name": "sub-02", "status": "done", "similarity_before": 0.2, "similarity_after": 0.31, "fold_pct": 0,
         "warnings": 2, "checks": "stretch; similarity", "decision": "redo", "note": "left temporal lobe"},
        {"name": "sub-03", "status": "failed", "error": "sub-03.nii.gz does not exist; check the path"}])
    with serving(server.opened(out.parent)) as one:
        tab.goto(one.address)
        tab.wait_for_selector("#rows table")
        picture("view_cohort.png", 270)
