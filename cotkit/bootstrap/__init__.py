"""A model that writes and a reward in, new rows out."""
