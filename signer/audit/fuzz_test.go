package audit

import (
	"bytes"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyhaven/keyhaven/signer"
)

func chmod(t testing.TB, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

// allKinds holds a line of each kind.
func allKinds() [][]byte {
	s := newSealer()
	var out [][]byte
	var prev Hash
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	for i, l := range []Line{
		{Kind: KindOpen, Open: Opening{Version: 1, Log: ID{1}, Server: testServer, Key: Hash{2}}},
		{Kind: KindOp, Op: *testRecord(1)},
		{Kind: KindOp},
		{Kind: KindCheckpoint, Checkpoint: Checkpoint{Log: ID{1}, Server: testServer, Covers: 2, Head: Hash{3}, Key: Hash{4}, Alg: "ed25519", Sig: []byte("signature")}},
		{Kind: KindLost, Note: Note{Count: 7, Text: "why"}},
		{Kind: KindRecovered, Note: Note{File: fileName(1), Bytes: 3, SHA256: Hash{5}, Text: "é\u202e😀\"\\\x00"}},
		{Kind: KindClose, Note: Note{Text: "size"}},
		{Kind: KindOpen, Open: Opening{Version: 1, Log: ID{1}, Server: testServer, PrevFile: fileName(1), PrevSeq: 7, PrevHead: Hash{6}, Abandoned: 3, Damage: "x"}},
	} {
		l.Seq, l.Time = uint64(i+1), at
		b, chain := s.seal(l.appendBody(nil), 0, &prev)
		prev = chain
		out = append(out, b)
	}
	return out
}

func TestLineLimits(t *testing.T) {
	long := strings.Repeat("x", 5000)
	r := signer.Record{
		Time: time.Now(), Duration: math.MinInt64, Peer: long, Op: strings.Repeat("\xff", 3000), Scheme: strings.Repeat("\U0001f600", 1000),
		Label: strings.Repeat("\x00", 3000), Home: strings.Repeat("é", 600), SNI: strings.Repeat("a\xff", 2000), Reason: strings.Repeat(`"`, 2000),
		TraceID: strings.Repeat("a", maxString-1) + "é", RequestID: strings.Repeat("a", maxString), Tries: -1,
		ClientIP: netip.MustParseAddr("fe80::1%\"x\n"), ServerIP: netip.MustParseAddr("::ffff:1.2.3.4"), Addr: netip.MustParseAddrPort("[fe80::1%eth0]:1"),
	}
	s := newSealer()
	line, chain := s.seal(appendOp(nil, math.MaxUint64, &r), 0, new(Hash))
	if len(line) > maxLine {
		t.Errorf("got a line of %d bytes", len(line))
	}
	l, err := ParseLine(line)
	if err != nil {
		t.Fatal(err)
	}
	if l.Chain != chain || l.Seq != math.MaxUint64 || l.Op.Duration != 0 || l.Op.Tries != 0 {
		t.Errorf("got %+v", l)
	}
	for _, c := range []struct{ name, got, want string }{
		{"long", l.Op.Peer, long[:maxString-len(ellipsis)] + ellipsis},
		{"no UTF-8", l.Op.Op, "\ufffd"},
		{"as long as allowed", l.Op.RequestID, r.RequestID},
		{"cut within a rune", l.Op.TraceID, strings.Repeat("a", maxString-len(ellipsis)) + ellipsis},
		{"zone", l.Op.ClientIP.String(), r.ClientIP.String()},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %q, want %q", c.name, c.got, c.want)
		}
	}
}

func TestOnlyCanonicalLinesAreTaken(t *testing.T) {
	good := string(allKinds()[1])
	if _, err := ParseLine([]byte(good)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, from, to string }{
		{"space", `,"kind"`, `, "kind"`},
		{"leading zero", `{"seq":2`, `{"seq":02`},
		{"unknown member", `,"op":`, `,"other":"x","op":`},
		{"repeated member", `,"op":`, `,"op":"x","op":`},
		{"zero member", `,"op":`, `,"waited":0,"op":`},
		{"other order", `"seq":2,"kind":"op"`, `"kind":"op","seq":2`},
		{"unknown kind", `"kind":"op"`, `"kind":"oq"`},
		{"time zone", `Z","dur"`, `+00:00","dur"`},
		{"needless escape", `"tls-sign"`, `"\u0074ls-sign"`},
		{"upper-case escape", `"www"`, `"\u00E9"`},
		{"no UTF-8", `"www"`, "\"\xff\""},
		{"lone surrogate", `"www"`, `"\ud800"`},
		{"number as text", `"www"`, `7`},
		{"text as number", `"tries":1`, `"tries":"1"`},
		{"upper-case hex", `"key":"010203`, `"key":"0X0203`},
		{"no end", "\"}\n", "\"}"},
		{"carriage return", "\"}\n", "\"}\r\n"},
		{"false", `"tries":1`, `"tries":1,"hedged":false`},
	} {
		bad := strings.Replace(good, c.from, c.to, 1)
		if bad == good {
			t.Fatalf("%s: nothing was changed", c.name)
		}
		if _, err := ParseLine([]byte(bad)); err == nil {
			t.Errorf("%s: %s was taken", c.name, bad)
		}
	}
}

// FuzzParseLine is about somebody who can write to a log's files, or sends an auditor an export: no line may bring the reader down, and whatever is taken has one spelling only.
func FuzzParseLine(f *testing.F) {
	for _, l := range allKinds() {
		f.Add(l)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		l, err := ParseLine(in)
		if err != nil {
			return
		}
		if got := l.encode(); !bytes.Equal(got, in) {
			t.Errorf("got  %q\nfrom %q", got, in)
		}
	})
}

// FuzzRecord is about clients, which choose some of the text in records: whatever they send, the line can be read again.
func FuzzRecord(f *testing.F) {
	f.Add("spiffe://keys.example/edge/one", "www.example", "request", "a\"\\\x00é😀\xff")
	f.Fuzz(func(t *testing.T, peer, sni, request, reason string) {
		r := signer.Record{Time: time.Unix(0, 0), Peer: peer, SNI: sni, RequestID: request, Reason: reason}
		line, _ := newSealer().seal(appendOp(nil, 1, &r), 0, new(Hash))
		l, err := ParseLine(line)
		if err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		if clean(peer) != l.Op.Peer || clean(sni) != l.Op.SNI || clean(request) != l.Op.RequestID || clean(reason) != l.Op.Reason {
			t.Errorf("got %+v from %q", l.Op, line)
		}
		if bytes.Count(line, []byte{'\n'}) != 1 || bytes.ContainsFunc(line[:len(line)-1], func(r rune) bool { return r < ' ' || r > '~' }) {
			t.Errorf("got %q", line)
		}
	})
}

// FuzzVerify is about files from somebody else: no file may bring the verifier down, and only what was written verifies.
func FuzzVerify(f *testing.F) {
	good := bytes.Join(allKinds()[:3], nil)
	f.Add(good)
	f.Add([]byte(`{"export":1,"log":"01000000000000000000000000000000","first":1,"prev":"` + Hash{}.String() + `","whole":true}` + "\n" + string(good)))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, in []byte) {
		path := filepath.Join(dir, "in.jsonl")
		write(t, path, in)
		rep, err := Verify(t.Context(), VerifyConfig{Files: []string{path}, Partial: true})
		if err == nil && rep.Problem == nil && len(in) > 0 && !bytes.HasSuffix(in, []byte("\"}\n")) && !isExport(in) {
			t.Errorf("%q was taken: %+v", in, rep)
		}
	})
}
