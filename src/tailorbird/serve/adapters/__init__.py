"""Adapters of a served model: read from PEFT's directories, kept in memory, replaced while they are used.

`allowed` says where they may be, `source` opens a directory, `lora`, `vera` and `ia3` say what its tensors
mean, and `kinds` picks one of them. `store` keeps named adapters, `versions` remembers them for later
processes; `publish` lets a new version in only where it is no worse, which `held_out` measures.
"""
