"""`python -m distillation PATH`: a folder of pictures in, a distilled set and a report of its worth out."""

from methods.folder import main

if __name__ == "__main__":
    raise SystemExit(main())
