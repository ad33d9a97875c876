# The card: which it is, what its partitions are called, and how its last partition gets the room behind it. Sourced by init.

# find_disk sets disk to the name of the device that holds the image: by the signature in the partition table or, as some
# systems write their own over it, by the label of the first partition.
find_disk() {
	for d in /sys/block/mmcblk* /sys/block/vd* /sys/block/sd* /sys/block/nvme*; do
		disk=${d##*/}
		[ -e "$d/size" ] && [ -e "$d/$(partition 4)" ] || continue
		[ "$(bytes "$disk" 440 4)" = 3156484b ] && return
		[ "$(bytes "$(partition 1)" 43 8)" = 4b4559484156454e ] && return
	done
	return 1
}

partition() { # number
	case $disk in *[0-9]) echo "${disk}p$1" ;; *) echo "$disk$1" ;; esac
}

bytes() { # device, offset, count: in hexadecimal
	dd if="/dev/$1" bs=1 skip="$2" count="$3" 2>/dev/null | hexdump -v -e '1/1 "%02x"'
}

# number reads four bytes of the partition table, least significant first.
number() { # offset
	# shellcheck disable=SC2046 # four numbers
	set -- $(dd if="/dev/$disk" bs=1 skip="$1" count=4 2>/dev/null | hexdump -v -e '1/1 "%u "')
	echo $((($1 | $2 << 8 | $3 << 16) + $4 * 16777216))
}

table=${table:-/run/mbr}

# grow_partition lets partition 4 end where the card ends. The table is one sector, which is written at once or not at all;
# nothing of the card is in use yet. A table that could not be read whole is never written.
grow_partition() {
	local start size sectors want i octal
	[ "$(bytes "$disk" 510 2)" = 55aa ] || return
	start=$(number 502) size=$(number 506) sectors=$(cat "/sys/block/$disk/size")
	want=$(((sectors - start) / 2048 * 2048))
	[ $want -le 4294965248 ] || want=4294965248
	[ $((want - size)) -ge 2048 ] || return
	dd if="/dev/$disk" of="$table" bs=512 count=1 2>/dev/null
	octal=
	for i in 0 8 16 24; do octal="$octal\\$(printf %03o $((want >> i & 255)))"; done
	# shellcheck disable=SC2059 # the format is the bytes
	printf "$octal" | dd of="$table" bs=1 seek=506 conv=notrunc 2>/dev/null
	if [ "$(wc -c <"$table")" -eq 512 ] && [ "$(bytes "..$table" 510 2)" = 55aa ] &&
		dd if="$table" of="/dev/$disk" bs=512 count=1 conv=notrunc,fsync 2>/dev/null && blockdev --rereadpt "/dev/$disk"; then
		say "the data partition now has $((want / 2048)) MiB"
	else
		note "The data partition could not be made larger; it stays as it is."
	fi
	rm -f "$table"
	for i in 1 2 3 4 5 6 7 8 9 10; do [ -b "/dev/$data" ] && return; sleep 0.2; done
}
