"""Private training: the handle of a loop of your own, and a loop of ours."""
