"""What is released: plan, ledger, sampling, clipping, noise. Plan and ledger need no torch."""
