"""Text and pictures of the pages, from the records in benchmarks/results/: `python benchmarks/report`."""
