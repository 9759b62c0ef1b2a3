"""Memory and time of a distillation from configurations alone: `linmu-distill --estimate`."""
