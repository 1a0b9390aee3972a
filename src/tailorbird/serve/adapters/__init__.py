"""Adapters of a served model: read from PEFT's directories, kept in memory, replaced while they are used.

`allowed` says where they may be, `source` opens a directory, `kinds` picks the file that says what tensors
mean, and `activation` on which tokens they act. `store` keeps named adapters, `versions` remembers them for
later processes, and `boarding` has them ready when the requests that wait for them may run. `publish` lets a
new version in only where it is no worse, which `held_out` measures.
"""
