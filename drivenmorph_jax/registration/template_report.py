"""The page of a template: report.html, with the rounds and the subjects."""

import html

from drivenmorph_jax.evaluation import figures, page

DEFINITIONS = {
    "change": "How much a round changed the displacements from the mean image to the subjects: mean length over the "
              "brain and the subjects. The rounds end where it is small.",
    "moved": "Mean length over the brain of the mean of these displacements, as they were registered. The round moves "
             "the mean image by its inverse, so that it becomes 0. What remains from round to round is an error that "
             "the registrations share.",
    "distance": "Mean length over the brain of the displacement from the template to a subject, after the affine; of a "
                "round, the mean over the subjects.",
    "sharpness": "Root mean square of the gradient over the brain, per mm, of an image with values of 0 to 1: of the "
                 "mean that the round registers, and of the template. It depends on the size of the voxels.",
    "bias": "Mean length over the brain of the mean displacement from the template to the subjects; 0 where the "
            "template is unbiased.",
    "chance": "The mean distance divided by the square root of the number of subjects: about the bias of a template "
              "that lies as far from the middle as the mean of that many subjects drawn at random.",
    "deviation": "The distance of a subject less the mean distance, in standard deviations.",
    "closest": "The least deviation. Below closest_by_chance, a subject is closer than chance has it in 5 % of cases "
               "(Grubbs' test).",
    "correlation": "Of the warped subject with the template, over the brain.",
    "scale": "Cube root of the determinant of the affine from the template to the subject."}


def write_report(out, summary, means):
    """Write out/report.html from the summary of a template and its images {name: (D, H, W)}, in order of the rounds."""
    picture = out / "template.png"
    figures.means(picture, means, summary["voxel_mm"], f"Template of {summary['images']} images",
                  "Each mean is that of the images as the rounds before left them.")
    closer = summary["closest"] < summary["closest_by_chance"]
    rows = ["| round | voxels (mm) | change (mm) | distance (mm) | moved (mm) | sharpness | seconds |", "|---|"]
    rows += [f"| {number} | {one['voxel_mm']:.2g} | {one['change_mm']:.3f} | {one['distance_mm']:.2f} | "
             f"{one['moved_mm']:.3f} | {one['sharpness']:.4f} | {one['seconds']:.0f} |"
             for number, one in enumerate(summary["rounds"], 1)]
    page.write(out / "report.html", "Template", [
        page.paragraph(f"{summary['images']} images, {summary['labelled']} of them with labels; voxels of "
                       f"{summary['voxel_mm']:.3g} mm; sharpness {summary['sharpness']:.4f}."),
        page.paragraph("The template stands still." if summary["still"] else
                       "The template did not come to a standstill: the last round still changed the displacements."),
        page.paragraph(f"Bias {summary['bias_mm']:.3f} mm; by chance it would be {summary['chance_mm']:.3f} mm. "
                       + ("One subject is closer to the template than by chance." if closer else
                          "No subject is closer to the template than by chance.")
                       + f" The least deviation is {summary['closest']:.2f}."),
        page.figure("Rounds", picture),
        page.table("\n".join(rows)),
        page.heading("Subjects"),
        page.paragraph("Those that correlate least with the template come first: look there for images that do not "
                       "belong. A click on a column's head sorts by it."),
        page.sortable(("subject", "distance (mm)", "deviation", "correlation", "scale"), [
            _cells(id, one) for id, one in sorted(summary["subjects"].items(), key=lambda row: row[1]["correlation"])]),
        page.heading("Definitions"), page.definitions(DEFINITIONS)])


def _cells(id, one):
    numbers = one["distance_mm"], one["deviation"], one["correlation"], one["affine_scale"]
    return [(html.escape(id), id), *((f"{x:.3f}", x) for x in numbers)]
