"""From a teacher's checkpoint to a LinMU checkpoint."""
