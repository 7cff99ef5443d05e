"""The computer: the BLAS on Linux, hardware and versions, the clock, the user's cache folder."""
