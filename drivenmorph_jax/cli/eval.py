"""Score a checkpoint on held-out pairs: report.html to look at, report.md, summary.json, pairs.csv and figures."""

from drivenmorph_jax.cli import program

EPILOG = """\
--config.KEY=VALUE changes a setting that the checkpoint was trained with. Example:

  %(prog)s --checkpoint runs/malf --out scores --data brains/ --split test"""


def main(arguments=None, prog="drivenmorph eval"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", help="the --workdir of a training; default: the shipped weights, brain-t1")
    add(
        "--out",
        metavar="DIR",
        default="runs/evaluation",
        help="folder for the results; it is made if it does not exist; default: runs/evaluation",
    )
    add(
        "--data",
        metavar="DIR",
        help="folder of ID_t1.nii.gz and ID_seg.nii.gz to score on; default: the data set of the training",
    )
    add("--split", default="test", choices=["train", "val", "test"], help="subjects to score on; default: test")
    add(
        "--refine_steps",
        type=program.count,
        default=0,
        metavar="N",
        help="refine the result of the network. The network registers forward and backward, both results are averaged, "
        "N iterations of Demons by local correlation follow, and the network registers the residual; "
        "default: 0, the network runs once, forward",
    )
    add(
        "--l2r",
        metavar="DIR",
        help="folder for the displacement fields in the format of Learn2Reg, disp_<fixed>_<moving>.nii.gz, in voxels",
    )
    add(
        "--rivals",
        metavar="NAMES",
        default="",
        help="other methods to run on the same pairs, each as a command of its own, separated by commas: affine, "
        "demons, demons-intensity, demons-mind, itk-demons, greedy, syn, syntx, fireants, fireants-syn, voxelmorph, "
        "transmorph; the scores are written to rivals.md, .jsonl and .png",
    )
    flags, settings = parser.parse_known_args(arguments)

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.evaluation.evaluate import evaluate_checkpoint
    from drivenmorph_jax.runtime import sharding
    from drivenmorph_jax.runtime.checkpoint import SHIPPED

    sharding.start()
    checkpoint, rivals = flags.checkpoint or SHIPPED, [name for name in flags.rivals.split(",") if name]
    evaluate_checkpoint(checkpoint, flags.out, flags.data, flags.split, settings, flags.refine_steps, flags.l2r, rivals)
