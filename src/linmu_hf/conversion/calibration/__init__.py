"""The parts of a calibration: rows that go through the decoder layer by layer, and what is fitted of one layer."""
