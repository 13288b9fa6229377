"""The one script of the report, which sorts its tables, and the policy under which a browser runs no other."""

import base64
import hashlib
import importlib.resources

TEXT = (importlib.resources.files("listopd_jax.report") / "sort.js").read_text("utf-8")
_DIGEST = base64.b64encode(hashlib.sha256(TEXT.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{_DIGEST}'; base-uri 'none'"
"""A Content-Security-Policy: the page loads nothing, and runs only the script of this digest."""
