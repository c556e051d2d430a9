#!/usr/bin/env bash
# All that this project says about its kernels on a GPU, from one command.
#
#   bash bench/gpu_suite.sh OUT            at most eight minutes, the most telling rows first
#   bash bench/gpu_suite.sh OUT --long     the whole matrix: hours
#   bash bench/gpu_suite.sh OUT --smoke    the smallest rows in Triton's interpreter, without a GPU
#
# Needs torch, Triton, numpy, pytest and pytest-benchmark for PYTHON (python3 unless said otherwise), no installation of
# this package and no network. Rivals take part where they can be imported: put them on PYTHONPATH (docs/benchmarks.md).
set -u
if [ $# -lt 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
out=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
# Only the package goes on the path: at the repository's root lies a folder `kernels`, which hides Hugging Face's.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$here/../entrocraft" "$site/entrocraft"
PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" "${PYTHON:-python3}" "$here/suite_gpu.py" --out "$out" "$@"
