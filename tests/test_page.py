import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from drivenmorph_jax.evaluation import page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def volumes(shape=(30, 40, 26), seed=0):
    rng = np.random.default_rng(seed)
    fixed, moving, warped = (rng.random(shape).astype(np.float32) * (np.indices(shape)[0] > 3) for _ in range(3))
    u = rng.standard_normal((*shape, 3)).astype(np.float32)
    return fixed, moving, warped, u, 0.5 * u, np.exp(0.1 * rng.standard_normal(shape)), (1.0, 1.0, 2.0)


def test_a_viewer_holds_its_volumes_in_the_order_that_its_script_reads():
    given = volumes()
    section = page.viewer("a <pair>", *given)
    data = json.loads(re.search(r"<script[^>]*>(.*)</script>", section)[1])
    nx, ny, nz = data["shape"]
    assert (nx, ny, nz) == (15, 20, 26) and "a &lt;pair&gt;" in section
    png = base64.b64decode(data["volumes"]["Fixed"]["png"].split(",")[1])
    picture = np.asarray(Image.open(io.BytesIO(png)))
    for x, y, z in ((14, 3, 25), (7, 19, 0), (9, 8, 13)):
        value = given[0][2 * x:2 * x + 2, 2 * y:2 * y + 2, z].mean() / data["volumes"]["Fixed"]["high"]
        row, column = z // data["columns"] * ny + y, z % data["columns"] * nx + x
        assert picture[row, column] == pytest.approx(255 * min(value, 1), abs=0.51)
    inside = np.unpackbits(np.frombuffer(base64.b64decode(data["inside"]), np.uint8), bitorder="little")
    assert inside[:15].tolist() == [0, 0] + [1] * 13


def test_markdown_tables_become_html():
    assert page.table("| a | b |\n| --- | ---: |\n| x & y | 1 |\n") == (
        '<div class="wide"><table><tr><th>a</th><th>b</th></tr><tr><td>x &amp; y</td><td>1</td></tr></table></div>')


def test_the_page_of_a_run_is_one_file(smoke):
    # Without what encodes its pictures, in which any four letters come up some day.
    text = re.sub(r"[\w+/=]{200,}", "", (smoke[0] / "evaluation" / "report.html").read_text())
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text
    assert text.count('class="viewer"') == 3 and "Driving force" in text and text.count("<table>") == 3


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_the_table_and_moves_through_the_slices(tmp_path):
    script = """<script>
    window.onerror = (...said) => { document.body.dataset.error = said.join(" "); };
    const wait = setInterval(() => {
      const section = document.querySelector(".viewer");
      if (!section.dataset.ready) return;
      clearInterval(wait);
      const canvas = section.querySelector("canvas"), pixel = () => canvas.toDataURL(), before = pixel();
      const slider = section.querySelector("[aria-label='Axial slice']");
      slider.value = 3; slider.dispatchEvent(new Event("input"));
      document.body.dataset.slice = section.dataset.place;
      document.body.dataset.changed = pixel() != before;
      const overlay = section.querySelectorAll("select")[1], plain = pixel();
      overlay.value = "log Jacobian"; overlay.dispatchEvent(new Event("input"));
      document.body.dataset.coloured = pixel() != plain;
    }, 50);
    </script>"""
    page.write(tmp_path / "page.html", "a test", [script, page.table("| a |\n| --- |\n| 0.5 |\n"),
                                                  page.viewer("pair", *volumes())])
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000",
                           "--enable-logging=stderr", "--v=0", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
                          capture_output=True, text=True, timeout=120)
    body = re.search(r"<body[^>]*>", done.stdout)[0]
    assert 'data-slice="7 10 3"' in body and 'data-changed="true"' in body and 'data-coloured="true"' in body
    assert "data-error" not in body and "CONSOLE" not in done.stderr
    assert "<td>0.5</td>" in done.stdout and "pair" in done.stdout
