"""The network: Llama-family GPT on megatron-core, its attention and norm, and Hugging Face conversion."""
