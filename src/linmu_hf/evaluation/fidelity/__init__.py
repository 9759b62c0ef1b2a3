"""How near a student is to its teacher inside: mixers, logits, and where the teacher's attention falls."""
