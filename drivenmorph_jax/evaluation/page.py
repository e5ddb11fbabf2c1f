"""report.html: tables, figures and slices to move through, in one file that needs no network connection.

The template is `page.html`. Its script draws the three planes of the volumes, which the page holds as pictures.
"""

import base64
import html
import io
import json
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
from matplotlib import colormaps
from PIL import Image

from drivenmorph_jax.evaluation.figures import uncropped
from drivenmorph_jax.evaluation.metrics import DEFINITIONS
from drivenmorph_jax.evaluation.tables import ABOUT_FORCE, LABELS, OF_FORCE, OF_PAIRS, markdown_table, pairs_table
from drivenmorph_jax.files import replacing
from drivenmorph_jax.images.volume import block_means

TEMPLATE = Path(__file__).with_name("page.html")
SPACING = 2.0  # mm, about the smallest voxels in the page
COLUMNS = 12  # axial slices in a row of a picture
MAPS = ("gray", "cividis", "RdBu_r")


def write(path, title, parts):
    """Write the page. `parts` are pieces of HTML, as the functions below return them.

    Raises InputError where the file cannot be written.
    """
    luts = {name: (255 * colormaps[name](np.arange(256))[:, :3]).round().astype(int).tolist() for name in MAPS}
    page = Template(TEMPLATE.read_text()).substitute(title=html.escape(title), body="\n".join(parts),
                                                     luts=json.dumps(luts))
    with replacing(path) as temporary:
        temporary.write_text(page)


def report(path, title, summary, rows, force, figures, viewers):
    """The page of an evaluation, from the arguments of `tables.report_md` and the pieces that `viewer` returned."""
    of_force = [heading("The driving force"), paragraph(ABOUT_FORCE), table(force)] if force else []
    defined = (*summary, *OF_FORCE) if force else summary
    write(path, title, [
        paragraph(OF_PAIRS.format(len(rows))), table(markdown_table(summary)),
        heading("Slices"), *viewers, *of_force,
        heading("Figures"), *(figure(caption, file) for caption, file in figures.items()),
        heading("Pairs"), table(pairs_table(rows)),
        heading("Definitions"), definitions({LABELS[key]: DEFINITIONS[key] for key in defined if key in DEFINITIONS})])


def heading(text):
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text):
    return f"<p>{html.escape(text)}</p>"


def table(markdown):
    """A Markdown table as HTML."""
    head, _, *rows = ([html.escape(cell.strip()) for cell in line.strip("|").split("|")]
                      for line in markdown.splitlines() if line)
    cells = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    return (f'<div class="wide"><table><tr>{"".join(f"<th>{cell}</th>" for cell in head)}</tr>'
            + "".join(f"<tr>{row}</tr>" for row in cells) + "</table></div>")


def sortable(head, rows):
    """A table that its reader sorts by a column.

    Args:
      head: names of the columns.
      rows: a row is a list of cells. A cell is (HTML, the number or text that it is sorted by, or None).
    """
    def cell(content, key):
        return f"<td>{content}</td>" if key is None else f'<td data-key="{html.escape(str(key))}">{content}</td>'

    names = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    body = "\n".join("<tr>" + "".join(cell(*one) for one in row) + "</tr>" for row in rows)
    return (f'<div class="wide"><table class="sortable"><thead><tr>{names}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>")


def link(text, address):
    """A link to a file; `address` is its path from the page."""
    return f'<a href="{html.escape(quote(address))}">{html.escape(text)}</a>'


def thumbnail(path, width, alt):
    """A PNG file, embedded in the page with a width in pixels."""
    file = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").resize((width, round(picture.height * width / picture.width)),
                                      reducing_gap=2).save(file, "jpeg", quality=70)
    content = base64.b64encode(file.getvalue()).decode()
    return f'<img loading="lazy" alt="{html.escape(alt)}" src="data:image/jpeg;base64,{content}">'


def definitions(found):
    """{term: its definition} as an HTML list."""
    return "<dl>" + "".join(f"<dt>{html.escape(term)}</dt><dd>{html.escape(meaning)}</dd>"
                            for term, meaning in found.items()) + "</dl>"


def figure(caption, path):
    """A PNG file, embedded in the page."""
    picture = base64.b64encode(Path(path).read_bytes()).decode()
    return f'<h3>{html.escape(caption)}</h3><img class="figure" alt="{html.escape(caption)}" src="{_PNG}{picture}">'


def viewer(caption, fixed, moving, warped, u, force, jacobian, spacing, heads=None, confidence=None):
    """Three planes of one pair to move through, with any of its volumes shown over any other.

    Args:
      fixed, moving, warped: (D, H, W), RAS; averaged to voxels of about `SPACING` mm where they are smaller.
      u, force: (D, H, W, 3) in voxels; their lengths are shown.
      jacobian: (D, H, W), or with 2 voxels cropped at each side as `metrics.jacobian` returns it; its logarithm is
        shown.
      spacing: voxel size in mm, (3,).
      heads: {name: (D, H, W)}, the whole heads of which `fixed`, `moving` or `warped` are the brains.
      confidence: (D, H, W) in [0, 1], see `registration.confidence`.
    """
    spacing = np.asarray(spacing, float)
    factors = np.maximum(1, np.rint(SPACING / spacing)).astype(int)
    inside = block_means((fixed > 0).astype(np.float32), factors) >= 0.5
    white = float(np.percentile(fixed[fixed > 0], 99.5)) if (fixed > 0).any() else 1.0
    logarithm = np.log(np.maximum(uncropped(jacobian, fixed.shape), 1e-3))
    found = {name: (x, "gray", 0.0, white, "") for name, x in (
        ("Fixed", fixed), ("Moving", moving), ("Warped", warped))}
    found |= {f"{name}, head": (x, "gray", 0.0, 1.0, "") for name, x in (heads or {}).items()}
    found["|Fixed - Warped|"] = np.abs(fixed - warped), "cividis", 0.0, white / 2, ""
    for name, x in (("|Displacement|", u), ("|Driving force|", force)):
        length = np.linalg.norm(x * np.float32(spacing), axis=-1)
        found[name] = length, "cividis", 0.0, max(float(np.percentile(length[fixed > 0], 99.8)), 0.1), "mm"
    bound = max(float(np.percentile(np.abs(logarithm[fixed > 0]), 99.5)), 0.1)
    found["log Jacobian"] = logarithm, "RdBu_r", -bound, bound, ""
    if confidence is not None:
        found["Confidence"] = confidence, "cividis", 0.0, 1.0, ""

    volumes = {}
    for name, (x, colours, low, high, unit) in found.items():
        small = np.clip((block_means(x, factors) - low) / (high - low), 0, 1)
        volumes[name] = {"png": _PNG + _mosaic(np.rint(255 * small).astype(np.uint8)), "map": colours, "low": low,
                         "high": high, "unit": unit}
    bits = np.packbits(inside.transpose(2, 1, 0).ravel(), bitorder="little").tobytes()
    data = {"shape": inside.shape, "columns": COLUMNS, "volumes": volumes, "inside": base64.b64encode(bits).decode()}
    return (f'<section class="viewer"><h3>{html.escape(caption)}</h3>'
            f'<script type="application/json">{json.dumps(data)}</script></section>')


_PNG = "data:image/png;base64,"


def _mosaic(voxels):
    """The axial slices side by side, row after row, as a grey PNG in base64."""
    nx, ny, nz = voxels.shape
    rows = -(-nz // COLUMNS)
    slices = np.pad(voxels, ((0, 0), (0, 0), (0, rows * COLUMNS - nz))).reshape(nx, ny, rows, COLUMNS)
    file = io.BytesIO()
    Image.fromarray(slices.transpose(2, 1, 3, 0).reshape(rows * ny, COLUMNS * nx)).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
