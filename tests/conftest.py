"""What all tests start from: no setting of the user's hub reaches them."""

import os

# huggingface_hub reads these when it is imported, so they go before any test module is.
for _name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(_name, None)
