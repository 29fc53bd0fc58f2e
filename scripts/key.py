"""Create, list and revoke the keys that let clients in."""

import argparse
import sys

from scripts import errors, keys
from scripts.settings import Settings


def main(argv: list[str] | None = None) -> int:
    """Run one command; a new key alone goes to standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("add", "list", "revoke"))
    parser.add_argument("name", nargs="?", default="", help="whose key it is, for the log")
    options = parser.parse_args(argv)
    folder = Settings.from_environ().keys
    if options.command == "list":
        for name, digest in sorted(keys.load(folder).items()):
            print(f"{name:<32} sha256 {digest}…")
        return 0
    if options.command == "revoke":
        keys.revoke(folder, options.name)
        print(f"{options.name}: revoked", file=sys.stderr)
        return 0
    print(keys.add(folder, options.name))
    print("this key is shown once; clients send it as Authorization: Bearer …", file=sys.stderr)
    return 0


if __name__ == "__main__":
    errors.run(main)
