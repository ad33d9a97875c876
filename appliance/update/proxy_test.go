package update

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// Index and bundle come by the proxy that the configuration names, with its login, and errors do not tell its password.
func TestProxy(t *testing.T) {
	const canary = "c4n4ry"
	p := newPublisher(t)
	p.publish(t, "1.1.0", 100)
	var asked []string
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Header.Set("Authorization", r.Header.Get("Proxy-Authorization"))
		if user, password, _ := r.BasicAuth(); user != "me" || password != canary {
			w.WriteHeader(http.StatusProxyAuthRequired)
			return
		}
		asked = append(asked, r.URL.String()) // one request at a time
		_, _ = w.Write(p.files[r.URL.Path])
	}))
	defer proxy.Close()
	try := func(password string) (*Engine, error) {
		u, err := url.Parse(proxy.URL)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword("me", password)
		e := newMachine("1.0.0").engine(t, p, func(c *Config) {
			c.Source, c.HTTP, c.Timing, c.Proxy = "http://updates.example.com", nil, fast, u
		})
		return e, e.Update(t.Context(), Request{})
	}
	e, err := try("wr0ng-" + canary)
	if all := fmt.Sprint(err, e.Report(), e.Text()); err == nil || !strings.Contains(all, "407") || strings.Contains(all, canary) {
		t.Errorf("a wrong password: %s", all)
	}
	if _, err := try(canary); err == nil || !strings.Contains(err.Error(), ErrRestart.Error()) {
		t.Errorf("got %v, want %v", err, ErrRestart)
	}
	want := "[http://updates.example.com/stable/arm64.json http://updates.example.com/stable/1.1.0.update]"
	if got := fmt.Sprint(asked); got != want {
		t.Errorf("the proxy was asked for %s, want %s", got, want)
	}
}
