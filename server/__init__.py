"""What runs at the coordinating centre and never sees a pixel of a training hospital; imports shared."""
