# The data partition, and what of it the system needs before it starts. Sourced by init.

said=${said:-/run/fsck.data} # what e2fsck printed

# readable tells whether the device answers at all: a card that does not must not lose what it holds.
readable() { dd if="/dev/$data" of=/dev/null bs=64k count=64 2>/dev/null; }

# has_ext4 tells whether this kernel could mount a sound one.
has_ext4() { grep -qw ext4 /proc/filesystems; }

# lost tells whether the device holds no file system any more: one whose head is there may only be out of reach for now.
lost() { readable && [ "$(bytes "$data" 1080 2)" != 53ef ]; }

# is_default tells whether the firmware starts the slot that runs by itself: it is not on trial.
is_default() { # configuration partition
	[ "$(sed -n 's/^boot_partition=//p' "$1/autoboot.txt" | head -n 1)" = "$part" ]
} 2>/dev/null

attach() { mount -t ext4 -o noatime,nosuid,nodev,noexec,errors=remount-ro "/dev/$data" "$1" 2>/dev/null; }

# card_fails finds in what e2fsck printed that it was the card that failed. To go on would put what was made up in place of
# what could not be read.
card_fails() { grep -qiE 'error (reading|writing)|input/output|short (read|write)|attempt to (read|write) block' "$said"; }

# repair checks the file system; it fails if errors are left.
repair() {
	e2fsck -p "/dev/$data" >"$said" 2>&1
	[ $? -lt 4 ] && return
	card_fails && return 1
	e2fsck -f -y "/dev/$data" >>"$said" 2>&1
	[ $? -lt 4 ] && note "The data partition was damaged and has been repaired."
}

# make_data makes the file system anew. Named by its path, or busybox would take its own mke2fs.
make_data() {
	/bin/mke2fs -q -t ext4 -F -b 4096 -L khdata -m 1 -i 16384 -J size=8 -E resize=268435456 "/dev/$data" >/run/mkfs.data 2>&1
}

# mount_data mounts the data partition, repaired if need be. It is made anew only if nothing of it is left, and never by a
# version on trial, which may be what is broken: the identity is on it. Where the card fails it is mounted unchecked, if that
# goes: the kernel stops writing at the first error. Otherwise memory stands in for it, and it stays as it is.
# It then lets the file system grow into its partition, mounted, as the kernel does that under its journal.
mount_data() { # where, configuration partition
	if ! { repair && attach "$1"; }; then
		sleep 5
		if repair && attach "$1"; then
			:
		elif card_fails && attach "$1"; then # what the device knows can be read, most likely
			note "Parts of the data partition cannot be read, so that it could not be checked. Replace the card, and give the device a new join token."
			return
		elif is_default "$2" && has_ext4 && lost && make_data && attach "$1"; then
			note "The data partition was beyond repair and has been made anew. This device needs a new join token."
		else
			note "The data partition cannot be used and is left as it is: what this device learns is lost when it is switched off. If this is so again after the next start, replace the card."
			mount -t tmpfs -o mode=755,size=20%,nosuid,nodev,noexec data "$1"
			return
		fi
	fi
	resize2fs "/dev/$data" >/run/resize.data 2>&1 || note "The file system of the data partition could not be made larger; it stays as it is."
}

# restore_id gives the system the machine id that keyhaven-appliance.service kept. At the first start there is none, and systemd
# makes one.
restore_id() { # new root
	local id
	read -r id <"$1/data/system/machine-id" || return
	case $id in
	*[!0-9a-f]*) ;;
	????????????????????????????????) echo "$id" >"$1/etc/machine-id" ;;
	esac
} 2>/dev/null
