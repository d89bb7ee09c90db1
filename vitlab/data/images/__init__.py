"""Bytes of image files to the views that a method asks for: decoded, cropped, coloured, mixed."""
