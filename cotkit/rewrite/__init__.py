"""A row in, a changed row out."""
