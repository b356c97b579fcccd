"""Per-example gradients of any torch model. Knows nothing of privacy.

Where to begin reading:

- what a gradient is: `layout` (which rows belong to which example), `forms` and its forms `factors`
  and `rows`, `uses` (several uses of one parameter); under them `rounding` and `kernels`;
- what is recorded: `records`, `trace` (from losses back to gradients), `signature`;
- how it is recorded: `provenance` (which tensors depend on the batch), `operations`, `calls`,
  `recorder`, `independent` and `entering` (how tensors that do not depend on the batch enter it),
  `tape`;
- `rules`: one file per layer family.
"""
