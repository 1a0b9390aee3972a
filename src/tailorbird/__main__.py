"""``python -m tailorbird`` is the program `tailorbird`."""

from __future__ import annotations

from tailorbird.cli.main import main

main()
