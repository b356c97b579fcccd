"""Private training: the handle of a loop of your own, and a loop of ours.

The way of a batch:

1. `loader` samples a logical batch, cuts it into physical ones, and announces each to `steps`.
2. The user's function computes the losses of a physical batch.
3. `stepping` has the engine clip their gradients; out comes a clip outcome.
4. `logical_batch` draws its noise, once, and adds the outcome to it.
5. `stepping` has the physical batch checked, as often as `dpnlu.engines.checks` says.
6. `logical_batch` is released with its last physical batch: the ledger first, then the optimizer.

A trainer that counts steps takes logical batches from `logical_loader` instead; where it steps the
optimizer itself, `handover` stands in the optimizer's place.
"""
