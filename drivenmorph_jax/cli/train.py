"""Train a network and score it on held-out pairs. The same command, given again, continues the training."""

from drivenmorph_jax.cli import program

EPILOG = """\
--config.KEY=VALUE changes a setting of the configuration. Example:

  %(prog)s --config malf --workdir runs/malf --config.data.root=brains/"""


def main(arguments=None, prog="drivenmorph train"):
    """Run the program with `arguments`, by default those of the command line. Raises InputError."""
    parser = program.parser(prog, __doc__, EPILOG)
    _run(parser.add_argument)
    _processes(parser.add_argument)
    flags, settings = parser.parse_known_args(arguments)
    given = (flags.coordinator, flags.processes, flags.process)
    if any(x is not None for x in given) and (None in given or not flags.distributed):
        parser.error("--coordinator, --processes and --process must be given together, and with --distributed")

    # Imported late, so that --help answers at once.
    from drivenmorph_jax.evaluation.tables import markdown_table
    from drivenmorph_jax.runtime import configuration, sharding
    from drivenmorph_jax.training.loop import train_and_evaluate

    sharding.start(
        flags.distributed,
        flags.deterministic,
        coordinator_address=flags.coordinator,
        num_processes=flags.processes,
        process_id=flags.process,
    )
    config = configuration.override(configuration.load(flags.config), settings)
    if flags.skip_bad:
        config.data.skip_bad = True
    summary = train_and_evaluate(config, flags.workdir, flags.memory)
    if summary is not None:
        print(markdown_table({key: summary[key] for key in summary["definitions"] if key in summary}))
        print(f"Checkpoints, logs and figures: {flags.workdir}; the report: {flags.workdir}/evaluation/report.html")


def _run(add):
    """Flags of the run."""
    add(
        "--config",
        required=True,
        metavar="NAME",
        help="configuration: the name of a shipped one, such as default, or a file, such as configs/default.py",
    )
    add(
        "--workdir",
        required=True,
        metavar="DIR",
        help="folder for checkpoints, logs and scores; it is made if it does not exist",
    )
    add(
        "--skip_bad",
        action="store_true",
        help="leave out subjects whose files cannot be read; by default one such file ends the program",
    )
    add(
        "--memory",
        metavar="SIZE",
        type=program.size,
        help="memory of each device that a training step may use, such as 16GB. Where a step would use more, levels "
        "are computed again in the backward pass, and then also in bfloat16 if that does not suffice",
    )
    add(
        "--deterministic",
        action="store_true",
        help="make two runs with one seed agree bit for bit on a GPU, which is slower; on a CPU they always agree",
    )


def _processes(add):
    """Flags of one of several processes."""
    add(
        "--distributed",
        action="store_true",
        help="this is one of several processes, which start together (Slurm, Kubernetes, Cloud TPU)",
    )
    add(
        "--coordinator",
        metavar="HOST:PORT",
        help="with --distributed, where the cluster does not provide it: address of the first process",
    )
    add("--processes", type=int, metavar="N", help="with --coordinator: number of processes")
    add("--process", type=int, metavar="I", help="with --coordinator: number of this process, from 0")
