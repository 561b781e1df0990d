"""Move GPT-2 weights between checkpoint formats: `gpt2 convert` under the name that the field knows."""

import sys

from gpt2_app.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
