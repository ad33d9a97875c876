#!/bin/bash
# The whole card, in the builder: /stage/disk.img. MBR, as the Pi's older boot ROMs read nothing else.
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
. /src/steps/arch.sh
tree=/stage/config
rm -rf "$tree"
mkdir "$tree"
[ -z "$firmware" ] || cp /stage/unpacked/usr/lib/raspi-firmware/bootcode.bin "$tree/"
cp /stage/in/keyhaven.yaml "$tree/keyhaven.yaml"
# A beginner's editor may know only one of the two line ends.
sed 's/$/\r/' /src/boot/README.txt >"$tree/README.txt"
printf '[all]\ntryboot_a_b=1\nboot_partition=2\n[tryboot]\nboot_partition=3\n' >"$tree/autoboot.txt"
/src/steps/fat.sh /stage/config.img 48 KEYHAVEN 4 "$tree"

# The data partition is small here and grows on the card. Room for the block groups of a terabyte is set aside.
rm -f /stage/data.img
truncate -s 64M /stage/data.img
E2FSPROGS_FAKE_TIME=$SOURCE_DATE_EPOCH mkfs.ext4 -q -b 4096 -L khdata -U 4b485631-0000-4000-8000-6b6864617461 -m 1 -i 16384 -J size=8 \
	-E "hash_seed=4b485631-0000-4000-8000-000000000001,resize=268435456,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,nodiscard" /stage/data.img

disk=/stage/disk.img
rm -f "$disk"
truncate -s 1G "$disk"
sfdisk -q --no-reread --no-tell-kernel "$disk" <<END
label: dos
label-id: 0x4b485631
unit: sectors
start=8192, size=98304, type=e, bootable
start=106496, size=524288, type=e
start=630784, size=524288, type=e
start=1155072, size=131072, type=83
END
put() { dd if="$1" of="$disk" bs=1M seek="$2" conv=notrunc,sparse status=none; }
put /stage/config.img 4
put /stage/slot.img 52
put /stage/data.img 564
