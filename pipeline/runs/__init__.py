"""Run folders: paths and done marks, atomic files, provenance, work shared by processes, figures."""
