"""One choice changed at a time, over seeds: the paper's Tables 2 to 4, how students start, and the block's inside."""
