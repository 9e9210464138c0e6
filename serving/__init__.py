"""Files in, files out: readers, writers and the embedding job."""
