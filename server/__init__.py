"""The code of the coordinating centre, which never sees a pixel of a training hospital; imports shared."""
