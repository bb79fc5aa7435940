# Sourced by the other scripts: goes to the root of the checkout and makes `.venv` there, with the package and what its
# development needs. A stamp inside keeps the second run from doing it again; nothing is fetched then.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

newest_python() {
  local name
  for name in python3.14 python3.13 python3.12 python3.11 python3 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  echo "scripts: no Python 3.11 or newer with venv is here: install one (python3.11 and python3.11-venv, for example)" >&2
  return 1
}

stamp_of() {
  { cat pyproject.toml; .venv/bin/python --version; pwd; } 2>/dev/null | cksum
}

make_environment() {
  if [ -f .venv/nalar-stamp ] && [ "$(cat .venv/nalar-stamp)" = "$(stamp_of)" ]; then
    return
  fi
  local python
  if ! .venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$(newest_python)"
    echo "scripts: making .venv with $("$python" --version)" >&2
    "$python" -m venv --clear .venv
  fi
  echo "scripts: installing nalar-mq and what its development needs into .venv" >&2
  .venv/bin/python -m pip install --quiet --editable '.[dev,local]' >&2
  stamp_of >.venv/nalar-stamp
}

make_environment
PATH="$PWD/.venv/bin:$PATH"
export PATH
