//go:build image

package qemu

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a person downloads stays small.
func TestSizes(t *testing.T) {
	limits := map[string]int64{"arm64": 90e6}
	name := strings.TrimSuffix(filepath.Base(image(t)), ".img")
	for _, kind := range []string{".img.xz", ".update"} {
		st, err := os.Stat(filepath.Join("../../../dist/image", name+kind))
		must(t, err)
		figure(t, "size of "+kind, float64(st.Size())/1e6, "MB", "arch", board(t).Arch)
		if limit := limits[board(t).Arch]; limit > 0 && st.Size() > limit {
			t.Errorf("%s has %d bytes, the limit is %d", name+kind, st.Size(), limit)
		}
	}
}
