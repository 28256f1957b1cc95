"""Lesion VAE-GAN: registered sequences from noise, with a chosen lesion (Qu et al.).

``structure`` is the first stage, a VAE-GAN of structure maps; ``generation`` the second, from a map and a label to all
sequences; ``cohort`` draws, filters and keeps what both make; ``segmentors`` judges what that is worth. ``maps`` has
Algorithms 1 and 2.
"""
