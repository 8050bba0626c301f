"""One file a verb. Stages never import each other; they meet in the run folder."""
