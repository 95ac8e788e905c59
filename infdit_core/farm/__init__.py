"""Folders of pictures over the processors of a machine or a cluster, with Ray."""
