"""The packed Llama encoder: configuration, tokens, packing, model, weights, `Encoder`."""
