# Debian's packages: found (resolve), pinned (lock files) and fetched by their SHA-256 into a cache. Sourced by build; runs on
# the host, as any user, with the host's apt and its proxy settings but none of its sources.
#
# A lock file has a line for each package: use, package, version, SHA-256, size, path below the mirror. Uses are "install" and
# "unpack".

# The mirrors. Those of a Debian host are taken from it; elsewhere MIRROR has to name one.
host_mirror() { # label
	apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' "Label: $1" 2>/dev/null | sed -n '1s|/$||p'
}
mirror=${MIRROR:-$(host_mirror Debian)}
[ -n "$mirror" ] || { echo "image: apt has no sources of Debian on this machine: name a mirror of Debian with MIRROR=http://HOST/debian" >&2; exit 1; }
security=${SECURITY_MIRROR:-$([ -n "${MIRROR:-}" ] || host_mirror Debian-Security)}
security=${security:-$mirror-security} # where mirrors have it
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "image: $*" >&2; }

words() { sed 's/#.*//; s/[[:space:]].*//; /^$/d' "$@"; }

# apt_update makes the private apt of one architecture in directory $1. The suites for updates and for security may be refused
# by a mirror that is half synchronised; that is said, and the build goes on without.
apt_update() { # directory arch
	local dir=$1 arch=$2 suite lists
	mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
	: >"$dir/state/status"
	cat >"$dir/apt.conf" <<-END
		APT::Architecture "$arch"; #clear APT::Architectures; APT::Architectures { "$arch"; };
		APT::Default-Release ""; APT::Install-Recommends "false"; APT::Sandbox::User "root";
		Dir::Etc::sourcelist "$dir/sources.list"; Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferences "/dev/null"; Dir::Etc::preferencesparts "/dev/null";
		Dir::State "$dir/state"; Dir::State::status "$dir/state/status"; Dir::Cache "$dir/cache";
		Acquire::Languages "none"; Acquire::ForceHash "SHA256"; Acquire::Retries "3";
	END
	local parts='main non-free-firmware' options="[arch=$arch signed-by=$keyring]"
	local main="deb $options $mirror $SUITE $parts"
	local more=("deb $options $mirror $SUITE-updates $parts" "deb $options $security $SUITE-security $parts")
	[ "${KERNEL:-stable}" != backports ] || more+=("deb $options $mirror $SUITE-backports $parts")
	printf '%s\n' "$main" >"$dir/sources.list"
	apt-get -c "$dir/apt.conf" -qq update || { say "no package lists of $SUITE for $arch at $mirror"; return 1; }
	for suite in "${more[@]}"; do
		lists=$(cat "$dir/sources.list")
		printf '%s\n' "$suite" >>"$dir/sources.list"
		apt-get -c "$dir/apt.conf" -qq update 2>"$dir/errors" && continue
		say "WARNING: left out, as the mirror does not serve it whole: $(echo "$suite" | cut -d' ' -f4-5) ($arch)"
		sed 's/^/image:   /' "$dir/errors" | head -3 >&2
		printf '%s\n' "$lists" >"$dir/sources.list"
	done
}

# lines turns apt's list of addresses on stdin into lines of a lock file.
lines() { # use
	sed -n "s/^'\([^']*\)' \([^ ]*\) \([0-9]*\) SHA256:\([0-9a-f]*\)$/\1 \2 \3 \4/p" |
		sed "s|^$mirror/|debian/|; s|^$security/|security/|" |
		while read -r path file size sum; do
			version=${file#*_}
			version=$(echo "${version%_*}" | sed 's/%3a/:/')
			echo "$1 ${file%%_*} $version $sum $size $path"
		done
}

# resolve writes the lock file of an architecture, or that of the builder, as the mirror has things now.
resolve() { # lock name: <arch> or builder-<arch>
	local name=$1 arch dir list kernel_from=''
	arch=${name#builder-} arch=${arch%-backports}
	dir=$(mktemp -d)
	apt_update "$dir" "$arch" || { rm -rf "$dir"; return 1; }
	{
		echo "# use package version sha256 size path; made by make image-lock"
		if [ "$name" = "builder-$arch" ]; then
			# shellcheck disable=SC2046 # words
			apt-get -c "$dir/apt.conf" -qq --print-uris install $(words "$here/packages.builder") | lines install
		else
			[ "${KERNEL:-stable}" != backports ] || kernel_from="-t $SUITE-backports"
			# shellcheck disable=SC2046 # words
			apt-get -c "$dir/apt.conf" -qq --print-uris install $(words "$here/packages") | lines install
			# shellcheck disable=SC2086 # perhaps nothing
			apt-get -c "$dir/apt.conf" -qq --print-uris $kernel_from install "$kernel" | lines unpack |
				grep -E '^unpack linux-(image|binary|modules|base)-[0-9]'
			list=$(awk -v arch="$arch" '!/^#/ && ($2 == "all" || index("," $2 ",", "," arch ",")) {print $1}' "$here/packages.boot")
			# shellcheck disable=SC2086 # words
			(cd "$dir" && apt-get -c "$dir/apt.conf" -qq --print-uris download $list) | lines unpack
		fi
	} >"$dir/lock"
	grep -q ' ' "$dir/lock" && [ "$(wc -l <"$dir/lock")" -gt 10 ] || { rm -rf "$dir"; say "apt found no packages for $name"; return 1; }
	LC_ALL=C sort -o "$dir/sorted" "$dir/lock"
	cat "$dir/sorted"
	rm -rf "$dir"
}

# fetch brings the packages of a lock file into the cache. It fails unless each is there with its SHA-256.
fetch() { # lock file
	local use package version sum size path wanted=() url
	exec 9>"$cache/lock"
	flock 9
	while read -r use package version sum size path; do
		[ "$use" != '#' ] && [ ! -e "$cache/debs/$sum.deb" ] || continue
		case $path in
		debian/*) url=$mirror/${path#debian/} ;;
		security/*) url=$security/${path#security/} ;;
		*) say "$1: unknown path $path"; return 1 ;;
		esac
		wanted+=("$url" "$cache/debs/$sum.part" "SHA256:$sum")
	done <"$1"
	if [ ${#wanted[@]} -gt 0 ]; then
		say "fetching $((${#wanted[@]} / 3)) packages"
		/usr/lib/apt/apt-helper -o APT::Sandbox::User=root -o Acquire::Retries=3 download-file "${wanted[@]}" >/dev/null || true
	fi
	while read -r use package version sum size path; do
		[ "$use" != '#' ] || continue
		if [ -e "$cache/debs/$sum.part" ] && echo "$sum  $cache/debs/$sum.part" | sha256sum -c --status; then
			mv "$cache/debs/$sum.part" "$cache/debs/$sum.deb"
		fi
		rm -f "$cache/debs/$sum.part"
		[ -e "$cache/debs/$sum.deb" ] || { say "cannot be had: $package $version"; return 1; }
	done <"$1"
	exec 9>&-
	awk -v d="$cache/debs/" '$1 != "#" {print $4 "  " d $4 ".deb"}' "$1" | sha256sum -c --quiet
}

# pin leaves the lines to build from in file $2: the lock file's, if all of its packages can be had; else what the mirror has
# now, unless LOCKED=1.
pin() { # lock name, file
	local lock=$here/lock/$1.txt
	if [ -e "$lock" ] && fetch "$lock"; then
		cp "$lock" "$2"
		return
	fi
	if [ "${LOCKED:-}" = 1 ]; then
		say "LOCKED=1, and the packages of ${lock#"$here/"} cannot all be had; make image-lock renews it"
		return 1
	fi
	resolve "$1" >"$2" && fetch "$2"
	[ ! -e "$lock" ] || say "WARNING: the mirror has moved: $(LC_ALL=C comm -13 <(LC_ALL=C sort "$lock") <(LC_ALL=C sort "$2") | wc -l) packages differ from ${lock#"$here/"}; the image will differ, too"
}
