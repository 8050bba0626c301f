"""SmolLM2-135M-Instruct, a real chat model for a laptop: where its file comes from, and the prompts it is asked."""
