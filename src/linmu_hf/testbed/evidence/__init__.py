"""What readers ask for, on the testbed: fidelity, sizes beyond training, the referees' ablations; as a page."""
