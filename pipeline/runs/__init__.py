"""Run folders: paths and done marks, atomic files, provenance, shards made by many processes, metrics and W&B."""
