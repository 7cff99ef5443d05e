"""`python -m mlx_vlm_prune.pruners`: the listing of the methods."""

from .listing import main

if __name__ == "__main__":
    main()
