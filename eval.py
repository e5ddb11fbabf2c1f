"""Score a checkpoint on held-out pairs: report.html to look at, report.md, summary.json, pairs.csv and figures."""

import argparse

from drivenmorph_jax.cli.program import run


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Settings that the checkpoint was trained with are changed by --config.KEY=VALUE. Example:\n\n"
               "  python eval.py --checkpoint runs/malf --out scores --data brains/ --split test")
    parser.add_argument("--checkpoint", metavar="DIR",
                        help="the --workdir of a training; default: the weights that come with the project, brain-t1")
    parser.add_argument("--out", metavar="DIR", default="runs/evaluation",
                        help="folder for the results; made where it is missing; default: runs/evaluation")
    parser.add_argument("--data", metavar="DIR",
                        help="folder of ID_t1.nii.gz and ID_seg.nii.gz to score on, instead of the training's data set")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"], help="default: test")
    parser.add_argument("--refine_steps", type=int, default=0, metavar="N",
                        help="carry the network's result further: the network both ways, N iterations of Demons by "
                             "local correlation, and the network twice on what is left; default: 0, the network once")
    parser.add_argument("--l2r", metavar="DIR",
                        help="folder for the fields as Learn2Reg has them, disp_<fixed>_<moving>.nii.gz, in voxels")
    parser.add_argument("--rivals", metavar="NAMES", default="",
                        help="run these too, each as a command of its own, on the same pairs: affine, demons, "
                             "demons-intensity, demons-mind, itk-demons, greedy, syn, syntx, voxelmorph, transmorph, "
                             "with commas between; writes rivals.md, .jsonl and .png")
    flags, settings = parser.parse_known_args()
    if flags.refine_steps < 0:
        parser.error("--refine_steps must be 0 or more")

    from drivenmorph_jax.evaluation.evaluate import evaluate_checkpoint
    from drivenmorph_jax.runtime import sharding
    from drivenmorph_jax.runtime.checkpoint import SHIPPED
    sharding.start()
    evaluate_checkpoint(flags.checkpoint or SHIPPED, flags.out, flags.data, flags.split, settings, flags.refine_steps,
                        flags.l2r, [name for name in flags.rivals.split(",") if name])


if __name__ == "__main__":
    run(main)
