"""Image encoders for mmhub: decoding and preprocessing of pictures, and any timm backbone."""
