#!/bin/bash
# Makes the installed system in $1 an appliance: nobody can log in, nothing of it is the same secret on two devices, no file
# that only a package manager or a person at a shell needs.
set -euo pipefail
trap 'echo "image: ${0##*/} failed at line $LINENO" >&2' ERR
root=$1
systemctl() { command systemctl --quiet --root "$root" "$@"; }

# Users. Every password is locked; what may come in over SSH, with a key, is root.
systemd-sysusers --root "$root"
sed -i -E 's/^([^:]+):[^:]*:[^:]*:/\1:*:1:/' "$root/etc/shadow"
rm -f "$root"/etc/{passwd-,shadow-,group-,gshadow-,subuid-,subgid-}

# Nothing here becomes another user by running a program.
find "$root" -xdev -type f -perm /6000 -exec chmod a-s {} +

# Units. Presets of Debian enable what is installed; what is wanted here is said by name.
rm -rf "$root"/etc/systemd/system/*.wants/{ssh,sshd,getty@tty1,remote-fs,e2scrub_reap,fstrim,wpa_supplicant,apt-daily*,dpkg-db-backup*}.*
rm -rf "$root"/etc/systemd/system/timers.target.wants
systemctl enable systemd-networkd systemd-resolved systemd-timesyncd dbus-broker
for unit in "$root"/etc/systemd/system/keyhaven-*.service; do
	[ ! -e "$unit" ] || ! grep -q '^\[Install\]' "$unit" || systemctl enable "$(basename "$unit")"
done
# No login prompt, on no console; no shell of an emergency; no database that a first boot would make.
for unit in getty@ serial-getty@ console-getty container-getty@ autovt@ debug-shell systemd-firstboot systemd-hwdb-update ldconfig systemd-logind \
	systemd-journal-catalog-update systemd-update-done systemd-machine-id-commit systemd-random-seed systemd-sysusers ssh.socket sshd-keygen systemd-pcrphase; do
	case $unit in *.*) ;; *) unit=$unit.service ;; esac
	ln -sfn /dev/null "$root/etc/systemd/system/$unit"
done
mkdir -p "$root/etc/systemd/system-generators"
for generator in systemd-getty-generator systemd-ssh-generator systemd-debug-generator systemd-gpt-auto-generator systemd-fstab-generator \
	systemd-cryptsetup-generator systemd-hibernate-resume-generator; do
	ln -sfn /dev/null "$root/etc/systemd/system-generators/$generator"
done
command systemctl --root "$root" set-default multi-user.target >/dev/null 2>&1

# What each device makes for itself.
rm -f "$root"/etc/ssh/ssh_host_* "$root"/var/lib/systemd/random-seed "$root"/etc/hostname
: >"$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id"
echo keyhaven >"$root/etc/hostname"
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"

# What nothing here reads. Copyright files stay, and dpkg's status, which says what this system consists of.
find "$root/usr/share/doc" -depth ! -name copyright ! -type d ! -path '*/keyhaven/*' -delete
find "$root/usr/share/doc" -depth -type d -empty -delete
rm -rf "$root"/usr/share/{man,info,locale,lintian,bash-completion,zsh,i18n,perl5,debconf,polkit-1,fonts}
rm -rf "$root"/usr/lib/*/{gconv,perl-base} "$root"/usr/bin/perl* "$root"/usr/share/ca-certificates
rm -rf "$root"/usr/lib/udev/{hwdb.d,hwdb.bin} "$root"/etc/udev/hwdb.bin "$root"/usr/lib/systemd/catalog
rm -rf "$root"/var/cache/* "$root"/var/log/* "$root"/var/lib/apt "$root"/var/lib/dpkg/{info,*-old,triggers,updates,lock*,alternatives} "$root"/etc/apt
rm -rf "$root"/var/lib/{ucf,pam} "$root"/usr/share/{ucf,pam-configs} "$root"/tmp/* "$root"/run/*
mkdir -p "$root"/var/log/journal && rmdir "$root"/var/log/journal
rm -rf "$root"/dev && mkdir "$root"/dev
