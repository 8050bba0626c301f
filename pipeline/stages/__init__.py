"""The stages, a file for each. Stages never import each other; they communicate through the run folder."""
