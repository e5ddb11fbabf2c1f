"""Convert a public data set, or a folder of your own, to the form that `train` and `eval` read.

SOURCE holds skull-stripped images in the layout NAME. Each image is checked, turned to RAS, aligned to the MNI152 brain
by an affine (unless the layout is aligned already), resampled to 1 mm and cropped to one grid. Labels follow by nearest
neighbour.

DESTINATION gets ID_t1.nii.gz, ID_seg.nii.gz, splits.json, labels.csv where the source has one, mni152_t1.nii.gz where
images were aligned to it, and contact_sheet.png. Look at the contact sheet: it shows a slice of every subject. A
subject that cannot be read is named and left out. A subject that is there already is not made again.

The id of an image is its BIDS name or its whole file name without the ending. Two images with one id, and two label
maps that fit one image equally, are refused. All images of a person are in one split: of sub-01_ses-1 the person is
sub-01; other ids are persons of their own.

Of a BIDS folder every session and run is an image of its own. The raw T1w image is taken before images of derivatives,
and of these the one in native space before those in the space of a template. Its label map, *_dseg, has the same
entities (sub, ses, acq, run, space and so on), except that desc, seg, atlas, label and scale may differ. Of several the
one that differs least is taken.
"""

from pathlib import Path

from drivenmorph_jax.cli import program


def main(arguments=None, prog="drivenmorph prepare"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    from drivenmorph_jax.data.folder import person
    from drivenmorph_jax.data.prepare import LAYOUTS, prepare

    layouts = "\n".join(f"  {name}: {layout.__doc__}" for name, (layout, _) in LAYOUTS.items())
    parser = program.parser(prog, __doc__, f"Layouts:\n\n{layouts}\n\nExample:\n\n  %(prog)s folder scans brains")
    add = parser.add_argument
    add("name", choices=LAYOUTS, metavar="NAME", help=f"layout of the data set, one of {', '.join(LAYOUTS)}")
    add("source", metavar="SOURCE", help="folder that holds the data set")
    add("destination", metavar="DESTINATION", help="folder for the result; it is made if it does not exist")
    add("--workers", type=int, metavar="N", help="number of subjects at a time; default: one a core")
    program.add_geometry(add)
    flags = parser.parse_args(arguments)
    made = prepare(flags.name, flags.source, flags.destination, flags.workers, flags.geometry)
    if len(set(map(person, made))) < 6:
        print("train and eval need 6 persons or more, since val and test need 2 each for a pair")
    print(f"{len(made)} subjects; look at {Path(flags.destination) / 'contact_sheet.png'}")
