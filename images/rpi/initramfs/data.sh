# The data partition, and what of it the system needs before it starts. Sourced by init.

# readable tells whether the device answers at all: a card that does not must not lose what it holds.
readable() { dd if="/dev/$data" of=/dev/null bs=64k count=64 2>/dev/null; }

attach() { mount -t ext4 -o noatime,nosuid,nodev,noexec,errors=remount-ro "/dev/$data" "$1" 2>/dev/null; }

# repair checks the file system; it fails if errors are left.
repair() {
	e2fsck -p "/dev/$data" >/run/fsck.data 2>&1
	[ $? -lt 4 ] && return
	e2fsck -f -y "/dev/$data" >>/run/fsck.data 2>&1
	[ $? -lt 4 ] && note "the data partition was damaged and has been repaired"
}

# mount_data mounts the data partition, repaired if need be; made anew if it is beyond repair; replaced by memory if the card
# cannot hold it. It then lets the file system grow into its partition, mounted, as the kernel does that under its journal.
mount_data() { # where
	if ! { repair && attach "$1"; }; then
		sleep 5
		if repair && attach "$1"; then
			:
		elif readable && mke2fs -q -t ext4 -F -b 4096 -L khdata -m 1 -i 16384 -J size=8 -E resize=268435456 "/dev/$data" >/run/mkfs.data 2>&1 && attach "$1"; then
			note "the data partition was beyond repair and has been made anew: this device needs a new join token"
		else
			note "the data partition cannot be used: what this device learns is lost when it is switched off; replace the card"
			mount -t tmpfs -o mode=755,size=20%,nosuid,nodev,noexec data "$1"
			return
		fi
	fi
	resize2fs "/dev/$data" >/run/resize.data 2>&1 || note "the data file system could not be made larger"
}

# machine_state gives the system what is this machine's own and no image's: its id, and the directory in which systemd keeps the
# random seed and the time.
machine_state() { # new root
	local state=$1/data/system id
	mkdir -p "$state/systemd" && chmod 755 "$state"
	id=$(cat "$state/machine-id" 2>/dev/null)
	case $id in
	*[!0-9a-f]* | '') id= ;;
	????????????????????????????????) ;;
	*) id= ;;
	esac
	if [ -z "$id" ]; then
		id=$(tr -d - </proc/sys/kernel/random/uuid)
		echo "$id" >"$state/machine-id.new" && sync && mv "$state/machine-id.new" "$state/machine-id" && sync
	fi
	echo "$id" >"$1/etc/machine-id"
	mount --bind "$state/systemd" "$1/var/lib/systemd"
}
