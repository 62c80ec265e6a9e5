"""A small, trained text-to-video model in the formats ComfyUI loads, and everything needed to train it again."""
