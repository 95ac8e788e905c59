"""The model of the paper: no files, no pictures, no policy."""
