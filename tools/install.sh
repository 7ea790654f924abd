#!/bin/sh
# Make a virtual environment in $1 with the pinned requirements, mmhub and its plugins (editable).
# uv installs where it can be had (about a minute), pip where not (two or three).
set -eu
venv=$1
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || {
  echo "mmhub needs Python 3.11, 3.12 or 3.13, but $PYTHON is $("$PYTHON" --version 2>&1)" >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$PYTHON" -m venv "$venv"
python=$venv/bin/python
compile=--compile-bytecode  # half a minute once, and every start of mmhub is twice as fast from the first on
if command -v uv >/dev/null 2>&1; then
  install="uv pip install --quiet --python $python"
elif "$python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then
  install="$venv/bin/uv pip install --quiet --python $python"
else
  install="$python -m pip install --quiet --disable-pip-version-check"
  compile=  # pip does it unasked
fi
echo "installing into $venv (5 GB, PyTorch mostly) ..." >&2
$install $compile -r requirements.lock
editable="--editable ."
for plugin in plugins/*/; do
  editable="$editable --editable $plugin"
done
$install --no-deps --no-build-isolation $editable
touch "$venv/.installed"
