"""From text to microbatches, in a global order that no layout can change.

`corpus` (documents and their split) -> `tokenizer` -> `store` (tokens on disk, memory-mapped; `prepare`
builds it once) -> `order` (which window is sample k) -> `feed` (the rows of one rank, as `Batch`).
`baselines` says what a model must beat. All but `feed` and `evaluation` work without torch, so nothing is
imported here.
"""
