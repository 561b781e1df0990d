"""Continue a text with GPT-2: the options that users of the field's script of this name know."""

import sys

from gpt2_app.run_generation import main

if __name__ == "__main__":
    sys.exit(main())
