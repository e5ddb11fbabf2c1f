"""Train DrivenMorph and score it on held-out pairs. Running it again in the same folder goes on where it stopped."""

import argparse

from drivenmorph_jax.cli.program import run, size


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Settings of the configuration are changed by --config.KEY=VALUE, as in the example:\n\n"
               "  python train.py --config configs/malf.py --workdir runs/malf --config.data.root=brains/")
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration, such as configs/default.py")
    parser.add_argument("--workdir", required=True, metavar="DIR",
                        help="folder for checkpoints, logs and scores; made where it is missing")
    parser.add_argument("--skip_bad", action="store_true",
                        help="leave out subjects whose files cannot be read, in place of refusing the folder")
    parser.add_argument("--memory", metavar="SIZE", type=size,
                        help="such as 16GB: what a step may take of each device; where it would take more, levels are "
                             "computed again in the backward pass, and if need be in bfloat16")
    parser.add_argument("--deterministic", action="store_true",
                        help="two runs of one seed give the same bits on a GPU too, more slowly; on CPU they always do")
    parser.add_argument("--distributed", action="store_true",
                        help="one of several processes: join the others first (Slurm, Kubernetes, Cloud TPU)")
    parser.add_argument("--coordinator", metavar="HOST:PORT",
                        help="with --distributed, where nothing tells: address of the first process")
    parser.add_argument("--processes", type=int, metavar="N", help="how many there are")
    parser.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
    flags, settings = parser.parse_known_args()
    told = (flags.coordinator, flags.processes, flags.process)
    if any(x is not None for x in told) and (None in told or not flags.distributed):
        parser.error("--coordinator, --processes and --process belong together, and to --distributed")

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.evaluation.tables import markdown_table
    from drivenmorph_jax.runtime import configuration, sharding
    from drivenmorph_jax.training.loop import train_and_evaluate
    sharding.start(flags.distributed, flags.deterministic, coordinator_address=flags.coordinator,
                   num_processes=flags.processes, process_id=flags.process)
    config = configuration.override(configuration.load(flags.config), settings)
    if flags.skip_bad:
        config.data.skip_bad = True
    summary = train_and_evaluate(config, flags.workdir, flags.memory)
    if summary is not None:
        print(markdown_table({key: summary[key] for key in summary["definitions"] if key in summary}))
        print(f"Checkpoints, logs and figures: {flags.workdir}; the report: {flags.workdir}/evaluation/report.html")


if __name__ == "__main__":
    run(main)
