"""Networks and pretrained models: the denoiser interface, who implements it, and how they are loaded."""
