# The data partition, and what of it the system needs before it starts. Sourced by init.

# readable tells whether the device answers at all: a card that does not must not lose what it holds.
readable() { dd if="/dev/$data" of=/dev/null bs=64k count=64 2>/dev/null; }

attach() { mount -t ext4 -o noatime,nosuid,nodev,noexec,errors=remount-ro "/dev/$data" "$1" 2>/dev/null; }

# repair checks the file system; it fails if errors are left.
repair() {
	e2fsck -p "/dev/$data" >/run/fsck.data 2>&1
	[ $? -lt 4 ] && return
	e2fsck -f -y "/dev/$data" >>/run/fsck.data 2>&1
	[ $? -lt 4 ] && note "The data partition was damaged and has been repaired."
}

# make_data makes the file system anew. Named by its path, or busybox would take its own mke2fs.
make_data() {
	/bin/mke2fs -q -t ext4 -F -b 4096 -L khdata -m 1 -i 16384 -J size=8 -E resize=268435456 "/dev/$data" >/run/mkfs.data 2>&1
}

# mount_data mounts the data partition, repaired if need be; made anew if it is beyond repair; replaced by memory if the card
# cannot hold it. It then lets the file system grow into its partition, mounted, as the kernel does that under its journal.
mount_data() { # where
	if ! { repair && attach "$1"; }; then
		sleep 5
		if repair && attach "$1"; then
			:
		elif readable && make_data && attach "$1"; then
			note "The data partition was beyond repair and has been made anew. This device needs a new join token."
		else
			note "The data partition cannot be used: what this device learns is lost when it is switched off. Replace the card."
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
