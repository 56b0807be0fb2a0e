"""``python -m flashmla`` is the ``flashmla`` command."""

from flashmla.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
