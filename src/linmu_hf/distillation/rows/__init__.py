"""Rows on their way to the steps: opened, checked, streamed, packed, in one order for any number of processes."""
