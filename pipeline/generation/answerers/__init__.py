"""Who answers prompts: one file an answerer, by the name that generate.engine gives it."""
