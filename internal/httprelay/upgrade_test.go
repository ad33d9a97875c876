package httprelay

import (
	"net/http"
	"testing"
)

func TestCheckSwitch(t *testing.T) {
	none, ws := http.Header{}, http.Header{"Connection": {"keep-alive, Upgrade"}, "Upgrade": {"WebSocket"}}
	for _, tt := range []struct {
		name           string
		asked, answers http.Header
		status         int
		ok             bool
	}{
		{"a plain answer", none, none, 200, true},
		{"as asked", ws, http.Header{"Connection": {"upgrade"}, "Upgrade": {"websocket"}}, 101, true},
		{"refused", ws, none, 403, true},
		{"not asked", none, ws, 101, false},
		{"not asked, without a name", none, none, 101, false},
		{"without a name", ws, none, 101, false},
		{"without Connection", ws, http.Header{"Upgrade": {"websocket"}}, 101, false},
		{"another", ws, http.Header{"Connection": {"upgrade"}, "Upgrade": {"h2c"}}, 101, false},
	} {
		if err := CheckSwitch(tt.asked, &http.Response{StatusCode: tt.status, Header: tt.answers}); (err == nil) != tt.ok {
			t.Errorf("%s: got %v", tt.name, err)
		}
	}
}
