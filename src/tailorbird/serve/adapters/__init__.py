"""Adapters of a served model: read from PEFT's directories, kept in memory, replaced while they are used.

`source` opens a directory, `lora`, `vera` and `ia3` say what its tensors mean, `kinds` picks one of them,
`store` keeps named adapters, and `publish` lets a new version in only where it is no worse.
"""
