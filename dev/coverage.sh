#!/usr/bin/env bash
# Line coverage of `cargo test` (unit and integration tests, the program run by them included; documentation tests are not counted).
# Needs llvm-profdata and llvm-cov of LLVM 19 or newer: LLVM=-19 dev/coverage.sh on Debian, where they are called llvm-cov-19.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# only the workspace's own crates are instrumented, so dependencies are not built again; Python because shells drop
# environment variables with a hyphen in their name, which cargo uses
cat > "$work/rustc" <<'WRAPPER'
#!/usr/bin/env python3
import os, sys
arguments = sys.argv[1:]
if "--print" not in arguments and "-vV" not in arguments:
    arguments += ["-C", "instrument-coverage"]
os.execvp(arguments[0], arguments)
WRAPPER
chmod +x "$work/rustc"

export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}
RUSTC_WORKSPACE_WRAPPER=$work/rustc LLVM_PROFILE_FILE=$work/%p-%m.profraw cargo test --tests 2>&1 | tee "$work/log"
objects=(-object "$CARGO_TARGET_DIR/debug/metal-candle")
while read -r binary; do
  objects+=(-object "$binary")
done < <(sed -nE 's/.*Running .*\((.*)\)/\1/p' "$work/log")
"llvm-profdata${LLVM:-}" merge -sparse "$work"/*.profraw -o "$work/data"
"llvm-cov${LLVM:-}" report --instr-profile="$work/data" "${objects[@]}" --ignore-filename-regex='(registry|rustc|/tests/|tests\.rs)'
