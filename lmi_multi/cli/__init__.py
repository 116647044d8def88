"""The command line: one short file a command, errors and exit codes in `main`.

Torch and transformers are imported by the commands that need them, when they run, so that
`--help`, `--version` and usage errors answer at once.
"""
