"""`python -m lmi_multi` is the `lmi-multi` command."""

from __future__ import annotations

from lmi_multi.cli.main import main

if __name__ == "__main__":
    main()
