package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"time"
)

// signatures follows the key server's log and prints a line for each signature.
type signatures struct {
	quiet bool

	mu    sync.Mutex // guards the fields below
	shown bool
	seen  []signature
}

// A signature is one record of the key server.
type signature struct {
	Time    time.Time     `json:"time"`
	Msg     string        `json:"msg"`
	Peer    string        `json:"peer"`
	Op      string        `json:"op"`
	Scheme  string        `json:"scheme"`
	SKI     string        `json:"key_ski"`
	SNI     string        `json:"sni"`
	Visitor string        `json:"visitor"`
	Result  string        `json:"result"`
	Reason  string        `json:"reason"`
	Dur     time.Duration `json:"dur"`
}

func (s *signatures) line(process, line string) {
	if process != "keyserver" || !strings.HasPrefix(line, "{") {
		return
	}
	var r signature
	if json.Unmarshal([]byte(line), &r) != nil || r.Msg != "operation" || r.Scheme == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seen = append(s.seen, r)
	if s.quiet {
		return
	}
	if s.shown {
		fmt.Println(r)
	}
}

func (r signature) String() string {
	out := fmt.Sprintf("%s  %-18s %s for %s, visitor %s", r.Time.Local().Format("15:04:05.000"), r.SNI, r.Scheme, r.Peer, r.Visitor)
	if r.Result != "ok" {
		return out + ": refused, " + r.Reason
	}
	return fmt.Sprintf("%s: key %s, %.2f ms", out, r.SKI[:min(8, len(r.SKI))], float64(r.Dur)/1e6)
}

// show prints each signature as it happens, from now on.
func (s *signatures) show() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shown = true
}

// of returns the good signatures for a name so far.
func (s *signatures) of(sni string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.seen {
		if r.SNI == sni && r.Result == "ok" {
			n++
		}
	}
	return n
}
