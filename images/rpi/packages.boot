# What is unpacked without being installed: no maintainer script runs, and what it depends on is not pulled in (what
# openssh-server needs is in packages). The kernel comes on top, see steps/arch.sh. The second column says for which architectures.
busybox-static all
dosfstools all
firmware-brcm80211 arm64,armhf,armel
openssh-server all
raspi-firmware arm64,armhf,armel
