package appliance

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// initramfs runs lines of shell after the scripts of the image's initial system, with files in a directory in place of devices.
func initramfs(t *testing.T, dir, lines string) string {
	t.Helper()
	up := strings.Repeat("../", 16) + strings.TrimPrefix(dir, "/")
	script := `set -u
up=` + up + ` dir=` + dir + ` said=` + dir + `/said part=2 disk=$up/disk data=$up/p4
hexdump() { case "$*" in *%02x*) od -An -v -tx1 | tr -d ' \n' ;; *) od -An -v -tu1 ;; esac; }
. ../images/rpi/initramfs/disk.sh
. ../images/rpi/initramfs/data.sh
note() { echo "note: $1"; }
say() { :; }
sleep() { :; }
` + lines
	out, err := exec.CommandContext(t.Context(), "sh", "-c", script).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// The identity of the device is on the data partition: it is made anew only where nothing is left of it, by a version that is
// not on trial, and never because the card, or the version that runs, fails.
func TestDataPartitionIsNotGivenUp(t *testing.T) {
	t.Parallel()
	const whole, gone = "\x53\xef", "\x00\x00"
	const badCard = `[ "$1" = -p ] || echo FORCED; echo "Error reading block 1027 (Input/output error)."; return 4`
	for name, c := range map[string]struct {
		magic, autoboot   string
		check, ext4, read string // functions' bodies
		want, not         string
	}{
		"sound":               {whole, "2", "return 0", "true", "", "mounted ext4", "made anew"},
		"repaired":            {whole, "2", `[ "$1" != -p ] || return 4`, "true", "", "has been repaired", "made anew"},
		"beyond repair":       {whole, "2", "return 8", "true", "", "left as it is", "made anew"},
		"the card fails":      {whole, "2", badCard, "true", "", "mounted ext4\nnote: Parts of the data partition cannot be read", "FORCED"},
		"the card fails more": {whole, "2", badCard, "true", "attach() { false; }", "left as it is", "FORCED"},
		"no program to check": {whole, "2", "return 127", "true", "", "left as it is", "made anew"},
		"a kernel without it": {whole, "2", "return 0", "false", "", "left as it is", "made anew"},
		"nothing is left":     {gone, "2", "return 8", "true", "", "has been made anew", "left as it is"},
		"gone, on trial":      {gone, "3", "return 8", "true", "", "left as it is", "made anew"},
		"gone, no autoboot":   {gone, "", "return 8", "true", "", "left as it is", "made anew"},
		"gone, no ext4":       {gone, "2", "return 8", "false", "", "left as it is", "made anew"},
		"cannot be read":      {gone, "2", "return 8", "true", "readable() { false; }", "left as it is", "made anew"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			p4 := make([]byte, 64<<10)
			copy(p4[1080:], c.magic)
			if err := os.WriteFile(filepath.Join(dir, "p4"), p4, 0o600); err != nil {
				t.Fatal(err)
			}
			if c.autoboot != "" {
				text := "[all]\ntryboot_a_b=1\nboot_partition=" + c.autoboot + "\n[tryboot]\nboot_partition=9\n"
				if err := os.WriteFile(filepath.Join(dir, "autoboot.txt"), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			out := initramfs(t, dir, `
made=false
has_ext4() { `+c.ext4+`; }
e2fsck() { $made || { `+c.check+`; }; }
make_data() { made=true; echo made anew; }
resize2fs() { :; }
mount() { case "$*" in
	*"-t tmpfs"*) echo mounted tmpfs ;;
	*) has_ext4 && { $made || [ "$(bytes "$data" 1080 2)" = 53ef ]; } && echo mounted ext4 ;;
	esac; }
`+c.read+`
mount_data /nowhere "$dir"; cat "$said"`)
			if !strings.Contains(out, c.want) || strings.Contains(out, c.not) {
				t.Errorf("want %q and not %q, got\n%s", c.want, c.not, out)
			}
		})
	}
}

// The partition table is written with one number changed, or, if it could not be read whole, not at all.
func TestPartitionGrows(t *testing.T) {
	t.Parallel()
	mbr := make([]byte, 4096)
	for i := range 440 {
		mbr[i] = byte(i)
	}
	binary.LittleEndian.PutUint32(mbr[502:], 1155072)
	binary.LittleEndian.PutUint32(mbr[506:], 131072)
	mbr[510], mbr[511] = 0x55, 0xaa
	grown := bytes.Clone(mbr)
	binary.LittleEndian.PutUint32(grown[506:], 4000000/2048*2048)
	for name, c := range map[string]struct {
		fault string
		want  []byte
	}{
		"all of it":     {"", grown},
		"no table read": {`dd() { case "$*" in *of=*mbr*bs=512*) ;; *) command dd "$@" ;; esac; }`, mbr},
		"half a table":  {`dd() { case "$*" in *of=*mbr*bs=512*) command dd "$@" bs=300 ;; *) command dd "$@" ;; esac; }`, mbr},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			disk := filepath.Join(dir, "disk")
			if err := os.WriteFile(disk, mbr, 0o600); err != nil {
				t.Fatal(err)
			}
			out := initramfs(t, dir, `
cat() { echo $((1155072 + 4000000)); }
blockdev() { :; }
table=$dir/mbr
`+c.fault+`
grow_partition`)
			if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, c.want) {
				t.Errorf("%v, the table is %x…\n%s", err, got[500:512], out)
			}
		})
	}
}
