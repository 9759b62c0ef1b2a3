"""Teacher-fed stages a few layers at a time, the rest of the model in CPU memory."""
