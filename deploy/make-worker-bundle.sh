#!/usr/bin/env bash
# Makes one file of itwin-worker and the libraries it needs, for sites that have no LibTorch: `worker: {bundle: FILE}` in the
# site file, and `itwin site add` unpacks it there. It runs from any directory, on any Linux of the same processor whose glibc
# is not older than this machine's (see below for the version).
#   deploy/make-worker-bundle.sh [--worker build/bin/itwin-worker] [--output itwin-worker.tar.gz] [--site-mpi] [--fast]
#     --site-mpi  leave MPI and what belongs to it (PMIx, UCX, hwloc, fabrics) to the site: load its Open MPI by `modules` in the
#                 site file. Its libmpi must be of the same major version as this machine's.
#     --fast      compress less
# Beside it lies FILE.operators.json: what models may use there. The gateway refuses others before they are queued.
# Without --site-mpi this machine's Open MPI is packed with its plug-ins; launch it then by srun --mpi=pmix.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source deploy/common.sh

worker=build/bin/itwin-worker
output=itwin-worker.tar.gz
site_mpi=0
level=6
while (($#)); do
  case "$1" in
    --worker) worker=${2:?--worker needs a path}; shift ;;
    --output) output=${2:?--output needs a path}; shift ;;
    --site-mpi) site_mpi=1 ;;
    --fast) level=1 ;;
    -h | --help) usage_of "$0"; exit 0 ;;
    *) echo "make-worker-bundle.sh: unknown option '$1'; see deploy/make-worker-bundle.sh --help" >&2; exit 2 ;;
  esac
  shift
done
[[ -x $worker ]] || { echo "make-worker-bundle.sh: $worker is not there; build it: cmake --build build --target itwin-worker" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/tmp}/itwin-bundle.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/bundle/bin" "$work/bundle/lib"
strip -o "$work/bundle/bin/itwin-worker" "$worker"
chmod 755 "$work/bundle/bin/itwin-worker"

# glibc and the loader stay the site's: they belong to its kernel and its name services.
glibc='^(ld-linux.*|libc|libm|libmvec|libpthread|libdl|librt|libresolv|libutil|libanl|libnsl|libnss_.*|libBrokenLocale|libthread_db)\.so'
mpi='^(libmpi.*|libopen-pal|libopen-rte|libompi.*|libpmix|libprrte|libevent.*|libhwloc|libuc[a-z_]*|libfabric|libpsm.*|librdmacm|libibverbs|libmunge|libnuma|libltdl)\.so'
add_libraries_of() {
  local name path
  # "libfoo.so.1 => /usr/lib/libfoo.so.1 (0x…)"
  while read -r name path; do
    [[ $path == /* ]] || { echo "make-worker-bundle.sh: $name, which $1 needs, is not on this machine" >&2; exit 1; }
    [[ $name =~ $glibc ]] && continue
    ((site_mpi)) && [[ $name =~ $mpi ]] && continue
    [[ -e $work/bundle/lib/$name ]] || cp -L "$path" "$work/bundle/lib/$name"
  done < <(ldd "$1" | awk '$2 == "=>" {print $1, $3}')
}
add_libraries_of "$worker"
# What the worker loads for Zarr stores alone, which ldd does not see.
for name in libblosc.so.1 libzstd.so.1; do
  path=$(PATH=$PATH:/sbin ldconfig -p | awk -v name="$name" '$1 == name && !seen++ {print $NF}')
  [[ -n $path ]] || continue
  [[ -e $work/bundle/lib/$name ]] || cp -L "$path" "$work/bundle/lib/$name"
  add_libraries_of "$path"
done

components=
if ((!site_mpi)); then
  # Open MPI and PMIx load plug-ins at run time, which ldd does not see.
  libdir=$(dirname "$(readlink -f "$(ldd "$worker" | awk '/libmpi\.so/ {print $3; exit}')")")
  for place in "$libdir/openmpi3" "$libdir/openmpi" "${libdir%/openmpi/lib}/openmpi/lib/openmpi3"; do
    [[ -e $place/mca_btl_self.so || -e $place/mca_pml_ob1.so ]] && components=$place && break
  done
  if [[ -n $components ]]; then
    mkdir -p "$work/bundle/openmpi"
    cp -L "$components"/mca_*.so "$work/bundle/openmpi/"
    for plugin in "$work"/bundle/openmpi/*.so; do
      # A plug-in for a fabric that this machine lacks is no loss.
      ldd "$plugin" 2>/dev/null | grep -q 'not found' && { rm -f "$plugin"; continue; }
      add_libraries_of "$plugin"
    done
  fi
  pmix=$(find "${libdir%/openmpi/lib}/pmix2/lib/pmix" /usr/lib/*/pmix2/lib/pmix -maxdepth 0 2>/dev/null | head -n 1 || true)
  if [[ -n $pmix ]]; then
    mkdir -p "$work/bundle/pmix"
    cp -L "$pmix"/*.so "$work/bundle/pmix/"
  fi
fi

glibc_version=$(ldd --version | awk 'NR == 1 {print $NF}')
cat >"$work/bundle/itwin-worker" <<'SH'
#!/bin/sh
# itwin-worker with the libraries beside it; made by deploy/make-worker-bundle.sh.
here=$(dirname "$(readlink -f "$0")")
LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
if [ -d "$here/openmpi" ]; then
  OMPI_MCA_mca_base_component_path=$here/openmpi
  export OMPI_MCA_mca_base_component_path
fi
if [ -d "$here/pmix" ]; then
  PMIX_MCA_mca_base_component_path=$here/pmix
  export PMIX_MCA_mca_base_component_path
fi
exec "$here/bin/itwin-worker" "$@"
SH
chmod 755 "$work/bundle/itwin-worker"
{
  echo "itwin-worker of $("$worker" --version 2>/dev/null | head -n 1)"
  echo "glibc at least $glibc_version, $(uname -m), MPI: $( ((site_mpi)) && echo "the site's" || echo "packed")"
} >"$work/bundle/README"

tar --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 -C "$work/bundle" -cf - . | gzip -n "-$level" >"$output.part"
"$worker" --operators >"$output.operators.json.part"
mv "$output.operators.json.part" "$output.operators.json"
mv "$output.part" "$output"
echo "$output: $(du -h "$output" | cut -f1), $(find "$work/bundle/lib" -type f | wc -l) libraries; needs glibc $glibc_version or newer, $(uname -m)"
