package ops

import "testing"

func TestGOGC(t *testing.T) {
	const most = 64 << 20
	for live, want := range map[uint64]int{0: 100, 1 << 20: 100, 64 << 20: 100, 128 << 20: 50, 256 << 20: 25, 1 << 40: 15} {
		if got := gogcFor(live, most); got != want {
			t.Errorf("%d bytes live: got %d, want %d", live, got, want)
		}
	}
}
