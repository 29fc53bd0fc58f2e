"""Print every route that the vLLM of an image has or could have, as METHOD path; runs inside it.

Read from its source, so that also those are known which only some setting or model turns on.
"""

import ast
import importlib.util
from pathlib import Path

_METHODS = ("get", "post", "put", "patch", "delete", "api_route", "mount", "add_route", "route")
# FastAPI's own, and the metrics, which are mounted by a path object.
_MORE = ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/metrics")


def main() -> None:
    entrypoints = Path(importlib.util.find_spec("vllm").origin).parent / "entrypoints"
    found = {("GET", path) for path in _MORE}
    for file in entrypoints.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            path = node.args[0] if node.args else None
            text = path.value if isinstance(path, ast.Constant) else ""
            if node.func.attr in _METHODS and isinstance(text, str) and text.startswith("/"):
                method = node.func.attr.upper()
                verbs = [method] if method in ("GET", "POST", "PUT", "PATCH", "DELETE") else []
                found |= {(verb, text) for verb in verbs or ("GET", "POST")}
    for method, path in sorted(found):
        print(method, path)


if __name__ == "__main__":
    main()
