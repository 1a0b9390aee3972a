"""`tailorbird formats`: what weights can be stored in, with what each takes and can hold."""

from __future__ import annotations

from tailorbird.cli import options
from tailorbird.cli.output import plain, print_json, print_table, working

EXAMPLE = "Example: tailorbird formats"


def formats(json: options.Json = False, seed: options.IdleSeed = 0, device: options.Device = "cpu") -> None:
    """List the formats of weights with bytes, error on Gaussian values, and the capacity that follows."""
    from tailorbird import api

    with working():
        rows = plain(api.formats())
    if json:
        print_json(rows)
        return
    columns = ("format", "bits per weight", "Gaussian error", "capacity", "of a perfect code", "")
    print_table(
        columns,
        [
            [
                row["name"], f"{row['bits_per_weight']:.3f}", f"{row['gaussian_error']:.3g}",
                f"{row['capacity']:.3f}", f"{row['bound']:.3f}", "" if row["ahead"] else "less than above",
            ]
            for row in rows
        ],
        texts=(0, 5),
    )  # fmt: skip
