package connector

import (
	"slices"
	"testing"
)

func TestRefusals(t *testing.T) {
	var r refusals
	r.forget("a") // of what was never heard
	said := func(edge, remedy string) (at []int) {
		for i := range 40 {
			if r.aloud(edge, remedy) {
				at = append(at, i+1)
			}
		}
		return at
	}
	want := []int{1, 8, 16, 32}
	for _, tt := range []struct{ edge, remedy string }{{"a", "join again"}, {"b", "join again"}, {"a", "update"}} {
		if got := said(tt.edge, tt.remedy); !slices.Equal(got, want) {
			t.Errorf("edge %s, %q: said at %v, want %v", tt.edge, tt.remedy, got, want)
		}
	}
	r.forget("a")
	if !r.aloud("a", "join again") {
		t.Error("no news after a session was up")
	}
	if r.aloud("b", "join again") {
		t.Error("forgetting one edge made another's refusal news")
	}
}
