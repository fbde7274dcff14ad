"""What ftrain decides, and nothing of how it is done: no clock, socket, file, thread, torch or zarr in here."""
