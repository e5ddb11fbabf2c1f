"""The page of a result: what it shows, who may see it, and how it looks in a browser."""

import http.client
import json
import shutil
import threading
import time
from importlib.util import find_spec
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import from_matvec

from drivenmorph_jax.errors import InputError
from drivenmorph_jax.images.reading import load_image
from drivenmorph_jax.transforms.files import write_force
from drivenmorph_jax.transforms.itk import write_affine
from drivenmorph_jax.transforms.transform import Transform
from drivenmorph_jax.view import layers, niivue, server
from drivenmorph_jax.view.layers import Shown

SHAPE = 30, 34, 32
AFFINE = from_matvec(np.diag([-2.0, 2, 2]), [30, -34, -32])  # LAS
TURN = from_matvec([[0, -1, 0], [1, 0, 0], [0, 0, 1]], [1.0, 2, 3])
SHIFT = np.array([2.0, -1, 2])  # mm, of length 3
SWOLLEN, FOLDED, FAULTY = (20, 17, 16), (15, 10, 16), (12, 20, 18)  # voxels; at FAULTY the images differ most


def save(path, data):
    nib.save(nib.Nifti1Image(data, AFFINE), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a result whose maps are known: x -> TURN (x + SHIFT)."""
    folder = tmp_path_factory.mktemp("study")
    out = folder / "out"
    out.mkdir()
    x = np.moveaxis(np.indices(SHAPE), 0, -1)
    brain = np.linalg.norm(x - np.array(SHAPE) / 2, axis=-1) < 13
    image = np.where(brain, 100 + 20 * np.sin(x).sum(-1), 0).astype(np.float32)
    near = np.linalg.norm(x - np.array(FAULTY), axis=-1) < 4
    save(folder / "fixed.nii.gz", image)
    save(folder / "moving.nii.gz", image)
    save(out / "warped.nii.gz", image)
    jacobian = np.full(SHAPE, 2.0, np.float32)
    jacobian[SWOLLEN], jacobian[FOLDED], jacobian[0, 0, 0] = 600, -1, 8  # the last one outside the brain
    save(out / "jacobian.nii.gz", jacobian)
    save(out / "confidence.nii.gz", np.where(near, 0.1, np.where(brain, 0.9, 0)).astype(np.float32))
    save(out / "uncertainty.nii.gz", np.full(SHAPE, 2.5, np.float32))
    save(out / "warped_labels.nii.gz", np.where(brain & (x[..., 0] > 15), 7, 0).astype(np.int16))
    grid = load_image(folder / "fixed.nii.gz")
    write_force(out / "force.nii.gz", np.broadcast_to(np.float32([0, 3, 4]), (*SHAPE, 3)), grid, "test")
    places = np.einsum("ij,...j", AFFINE[:3, :3], x) + AFFINE[:3, 3]
    total = (places + SHIFT) @ TURN[:3, :3].T + TURN[:3, 3] - places
    Transform(total.astype(np.float32), grid, TURN @ from_matvec(np.eye(3), SHIFT)).save(out / "displacement.nii.gz")
    write_affine(out / "affine.tfm", TURN)
    checks = [{"name": "overlap", "value": 0.95, "limits": [0.9, 1], "status": "ok", "sentence": "Dice."},
              {"name": "stretch", "value": 9.0, "limits": [0, 7], "status": "warn", "sentence": "<b>Range</b>."},
              {"name": "similarity", "value": None, "limits": [0.3, None], "status": "warn", "sentence": "Local."}]
    marks = [{"name": "one", "fixed": [1.0, 2, 3], "before_mm": 4.0, "after_mm": 0.1, "left_out": None},
             {"name": "<i>two", "fixed": [9.0, 9, 9], "before_mm": 4.0, "after_mm": 8.0, "left_out": "contradicts one"}]
    (out / "summary.json").write_text(json.dumps({
        "fixed": str(folder / "fixed.nii.gz"), "moving": str(folder / "moving.nii.gz"), "method": "demons",
        "checks": checks, "landmarks": marks, "files": sorted(path.name for path in out.iterdir())}))
    return folder


@pytest.fixture(scope="module")
def shown(folder):
    return Shown(folder / "out")


def test_maps_are_the_lengths_and_logarithms_of_the_files(shown):
    brain = shown.fixed.data > 0
    for name, wanted in (("displacement", 3), ("force", 5), ("uncertainty", 2.5)):  # the first without the affine
        np.testing.assert_allclose(shown.voxels(name), np.where(brain, wanted, 0), atol=1e-3)
    jacobian = shown.voxels("jacobian")
    assert jacobian[15, 17, 8] == 1 and jacobian[SWOLLEN] == layers.OCTAVES and jacobian[FOLDED] == -layers.OCTAVES
    assert not jacobian[~brain].any()
    ticks = shown.overlays()["jacobian"].ticks
    assert all(2.0**value == eval(text) for value, text in ticks)


def test_outlines_are_the_borders_of_labels():
    labels = np.zeros((9, 9, 9), int)
    labels[2:7, 2:7, 2:7] = 4
    labels[4:7, 2:7, 2:7] = 5
    edge = layers.outlines(labels)
    assert not edge[labels == 0].any() and edge[4, 2:7, 2:7].all() and not edge[3, 3:6, 3:6].any()
    assert edge.sum() == 3 * 25 + 2 * 16  # layers 2, 4 and 6 along the first axis are whole


def test_every_layer_is_a_file_that_niivue_shows_rightly(shown):
    for name in (*shown.images, *shown.maps):
        image = nib.Nifti1Image.from_bytes(shown.file(name))
        assert image.shape == SHAPE and image.get_data_dtype() == np.float32 and not image.header["intent_code"]
        for affine, code in (image.get_qform(coded=True), image.get_sform(coded=True)):
            np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
            assert code > 0
    np.testing.assert_array_equal(nib.Nifti1Image.from_bytes(shown.file("fixed")).dataobj, shown.fixed.data)


def test_checks_lead_to_where_they_are_worst(shown):
    places = shown.places()
    np.testing.assert_allclose(places["stretch"], nib.affines.apply_affine(AFFINE, SWOLLEN))
    assert np.linalg.norm(places["similarity"] - nib.affines.apply_affine(AFFINE, FAULTY)) < 2 * 6
    assert places["landmarks"] == [1, 2, 3]  # the other was left out
    told = shown.described()["checks"]
    assert [one["name"] for one in told] == ["stretch", "similarity", "overlap"] and told[2]["place"] is None


def test_a_folder_without_a_result_and_a_missing_image_are_refused(folder, tmp_path):
    with pytest.raises(InputError, match="holds no result of register"):
        Shown(tmp_path)
    copy = shutil.copytree(folder / "out", tmp_path / "out")
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps(summary | {"moving": "gone.nii.gz"}))
    with pytest.raises(InputError, match="gone.nii.gz, which .* does not exist"):
        Shown(copy)


@pytest.fixture(scope="module")
def running(shown):
    with server.Server(shown) as one:
        thread = threading.Thread(target=one.serve_forever, daemon=True)
        thread.start()
        yield one
        one.shutdown()
        thread.join(10)


def answer(running, path, method="GET", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", running.server_port, timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): text for name, text in headers.items()})
        found = connection.getresponse()
        return SimpleNamespace(status=found.status, headers=found.headers, body=found.read())
    finally:
        connection.close()


def test_the_page_is_served_on_the_loopback_address_with_its_policy(running):
    assert running.server_address[0] == "127.0.0.1" and len(running.token) >= 32
    page = answer(running, f"/{running.token}/")
    assert page.status == 200 and b"<canvas>" in page.body
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert "http" not in page.headers["Content-Security-Policy"] and b"http" not in page.body
    assert "Access-Control-Allow-Origin" not in page.headers and page.headers["Referrer-Policy"] == "no-referrer"
    told = json.loads(answer(running, f"/{running.token}/result.json").body)
    assert told["title"] == "moving.nii.gz to fixed.nii.gz"
    assert answer(running, f"/{running.token}/force.nii").body == running.shown.file("force")


def test_nothing_else_is_served(running):
    token = running.token
    names = "other", "summary.json", "../../etc/passwd", "..%2fsummary.json", "fixed", "/etc/passwd", "fixed.nii/"
    for path in ("*", "/", "/result.json", f"/{token[:-1]}x/", f"/{token}", *(f"/{token}/{name}" for name in names)):
        assert answer(running, path).status == 404, path
    assert answer(running, f"/{token}/", "POST").status == 501


def test_other_sites_are_refused(running):
    port, page = running.server_port, f"/{running.token}/"
    for headers in ({"Host": f"evil.example:{port}"}, {"Host": "127.0.0.1"}, {"Origin": "http://evil.example"},
                    {"Origin": "null"}, {"Origin": f"http://127.0.0.1:{port + 1}"}, {"Sec_Fetch_Site": "cross-site"},
                    {"Sec_Fetch_Site": "same-site"}):
        assert answer(running, page, **headers).status == 403, headers
    for headers in ({"Host": f"localhost:{port}"}, {"Origin": f"http://127.0.0.1:{port}"},
                    {"Sec_Fetch_Site": "same-origin"}):
        assert answer(running, page, **headers).status == 200, headers


def test_the_server_ends_when_the_last_page_is_closed(shown, monkeypatch):
    monkeypatch.setattr(server, "GRACE", 0.3)
    monkeypatch.setattr(server, "BEAT", 0.05)
    with server.Server(shown) as one:
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        pages = []
        for _ in range(2):
            connection = http.client.HTTPConnection("127.0.0.1", one.server_port, timeout=20)
            connection.request("GET", f"/{one.token}/alive")
            pages.append(connection.getresponse())
            assert pages[-1].read(10) == b": alive\n\n:"
        pages[0].close()
        time.sleep(1.5)
        assert thread.is_alive()  # the other is open
        pages[1].close()
        thread.join(20)
        assert not thread.is_alive()


def test_a_port_in_use_is_refused(running, shown):
    with pytest.raises(InputError, match=f"port {running.server_port} cannot be used"):
        server.Server(shown, running.server_port)


def test_niivue_is_found_or_asked_for_in_one_sentence(monkeypatch, tmp_path):
    (tmp_path / "static").mkdir()
    script = tmp_path / "static" / "widget.js"
    script.write_text('if(!v){console.log("Creating new Niivue instance");let B=g();v=new t$2(C)}export{w as default};')

    def made(found):
        monkeypatch.setattr(niivue, "find_spec", lambda name: found)
        niivue.module.cache_clear()
        return niivue.module()

    there = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    assert made(there).endswith("\nexport { t$2 as Niivue };\n")
    script.write_text("another")
    with pytest.raises(InputError, match="has no NiiVue that the page can use: pip install"):
        made(there)
    with pytest.raises(InputError, match="the page needs NiiVue: pip install --no-deps ipyniivue=="):
        made(None)
    niivue.module.cache_clear()


@pytest.fixture(scope="module")
def browser():
    """A page in Chromium, or a reason to skip."""
    if find_spec("ipyniivue") is None:
        pytest.skip("ipyniivue, which carries NiiVue, is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None or find_spec("playwright") is None:
        pytest.skip("a Chromium and the package playwright are not installed")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=chromium, args=[
            "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"])
        yield one.new_page(viewport={"width": 1200, "height": 800})
        one.close()


def test_the_page_in_a_browser(running, browser):
    from playwright.sync_api import expect
    page, asked, faults = browser, [], []

    def says(place, text):
        expect(page.locator(place)).to_contain_text(text, timeout=20_000)

    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.goto(running.address)
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    assert page.title() == "moving.nii.gz to fixed.nii.gz"
    assert "<b>Range</b>." in page.inner_text("#checks") and "<i>two" in page.inner_text("#landmarks")
    page.locator("#checks button").first.click()  # of the check "stretch"
    x, y, z = nib.affines.apply_affine(AFFINE, SWOLLEN)
    place = f"{'RL'[int(x < 0)]} {abs(x):.1f}, {'AP'[int(y < 0)]} {abs(y):.1f}, {'SI'[int(z < 0)]} {abs(z):.1f} mm"
    assert page.inner_text("#status").startswith(place)
    page.select_option("#overlay", "jacobian")
    says("#status", "jacobian determinant 4.00")
    assert page.inner_text("#legend").split()[:5] == ["1/4", "1/2", "1", "2", "4"]
    page.check("#labels")
    says("#legend", "Label outlines")
    page.select_option("#overlay", "displacement")
    says("#status", "displacement 3.00 mm")
    assert "Displacement (mm)" in page.inner_text("#legend")
    for mode, visible in (("swipe", False), ("blink", False), ("side", True)):
        page.select_option("#mode", mode)
        assert page.is_visible("#moving") == visible and page.is_visible("#swipe") == (mode == "swipe")
    page.select_option("#slices", "0")
    box = page.locator("#warped canvas").bounding_box()
    page.wait_for_timeout(500)
    page.mouse.click(box["x"] + 0.6 * box["width"], box["y"] + 0.45 * box["height"])
    expect(page.locator("#status")).not_to_contain_text(place, timeout=20_000)
    assert not faults and asked and all(url.startswith((running.address, "data:", "blob:")) for url in asked)
