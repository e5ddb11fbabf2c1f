"""The programs: `drivenmorph` with its subcommands, one module a subcommand."""
