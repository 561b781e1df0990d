"""`python -m gpt2_app` is the `gpt2` command."""

from gpt2_app.main import main

if __name__ == "__main__":
    main()
