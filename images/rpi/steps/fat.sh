#!/bin/bash
# Makes a FAT16 volume of a directory, the same bytes from the same files:
#
#   fat.sh IMAGE MIB LABEL SECTORS-PER-CLUSTER DIRECTORY
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
image=$1 size=$2 label=$3 cluster=$4 tree=$5
rm -f "$image"
truncate -s "${size}M" "$image"
mkfs.vfat --invariant -F 16 -s "$cluster" -n "$label" "$image" >/dev/null
find "$tree" -exec touch -d "@$SOURCE_DATE_EPOCH" {} +
(cd "$tree" && LC_ALL=C && export LC_ALL && for f in *; do MTOOLS_SKIP_CHECK=1 mcopy -spmQ -i "$image" "$f" "::$f"; done)
fsck.vfat -n "$image" >/dev/null || { echo "image: $image is not a sound FAT volume" >&2; exit 1; }
