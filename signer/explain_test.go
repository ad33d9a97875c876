package signer

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

func TestExplain(t *testing.T) {
	reg := testRegistry(t, true)
	p256, rsaKey := reg.BySKI(skiOf(t, "p256")), reg.BySKI(skiOf(t, "rsa"))
	es256, sha1 := Algorithm{ECDSA, crypto.SHA256}, Algorithm{PKCS1v15, crypto.SHA1}
	c := newClock("2026-11-23T12:00:00Z")
	p := policyOn(t, Options{Clock: c.Now, Legacy: Legacy{MD5SHA1: true}},
		ClientRule{ID: edgeTwo, Operations: []string{"ping"}},
		ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"www.example.com"}, Windows: []string{"Mon 06:00-10:00", "Tue 06:00-10:00"}},
		ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"*.example.com"}, Rate: "1/h"},
		ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"tls-sign"}, Schemes: []string{"ed25519"}, SNIs: []string{"*"}},
		ClientRule{ID: edgeOne, Keys: []string{"rsa"}, Operations: []string{"sign", "decrypt"}, Schemes: []string{"rsa_pkcs1_sha1", "rsa_pkcs1_md5sha1"}, SNIs: []string{"*"}, Daily: 1},
	)
	tests := []struct {
		name string
		q    Query
		rule int
		want Reason
		all  string // each rule's field
	}{
		{"client", Query{Client: "spiffe://x/edge/three", Op: OpTLSSign, Key: p256, Scheme: es256}, -1, RefusedClient, ""},
		{"allowed", Query{Client: edgeOne, Op: OpTLSSign, Key: p256, Scheme: es256, SNI: "WWW.example.com"}, 2, Allowed, "1 windows, 2 , 3 schemes, 4 operations"},
		{"earlier", Query{Client: edgeOne, Op: OpTLSSign, Key: p256, Scheme: es256, SNI: "www.example.com", At: newClock("2026-11-24T09:00:00Z").Now()}, 1, Allowed, "1 , 2 , 3 schemes, 4 operations"},
		{"name", Query{Client: edgeOne, Op: OpTLSSign, Key: p256, Scheme: es256, SNI: "example.org"}, 3, RefusedScheme, "1 snis, 2 snis, 3 schemes, 4 operations"},
		{"key", Query{Client: edgeOne, Op: OpTLSSign, Key: rsaKey, Scheme: es256, SNI: "www.example.com"}, 1, RefusedKey, "1 keys, 2 keys, 3 keys, 4 operations"},
		{"no such key", Query{Client: edgeOne, Op: OpTLSSign, Scheme: es256, SNI: "www.example.com"}, 1, RefusedKey, "1 keys, 2 keys, 3 keys, 4 operations"},
		{"operation", Query{Client: edgeTwo, Op: OpSeal}, 0, RefusedOp, "0 operations"},
		{"unknown algorithm", Query{Client: edgeOne, Op: OpTLSSign, Key: p256, SNI: "www.example.com"}, 2, RefusedScheme, "1 windows, 2 schemes, 3 schemes, 4 operations"},
		{"switched off", Query{Client: edgeOne, Op: OpSign, Key: rsaKey, Scheme: sha1}, 4, RefusedLegacy, "1 operations, 2 operations, 3 operations, 4 legacy.sha1"},
		{"switched on", Query{Client: edgeOne, Op: OpSign, Key: rsaKey, Scheme: Algorithm{PKCS1v15, crypto.MD5SHA1}}, 4, Allowed, "1 operations, 2 operations, 3 operations, 4 "},
		{"decryption", Query{Client: edgeOne, Op: OpDecrypt, Key: rsaKey}, 4, RefusedLegacy, "1 operations, 2 operations, 3 operations, 4 legacy.decrypt"},
	}
	check := func(name string, p *Policy, q Query, rule int, want Reason, all string) {
		t.Helper()
		d := p.Explain(q)
		var fields []string
		for _, v := range d.Rules {
			fields = append(fields, fmt.Sprint(v.Rule, " ", v.Field))
			if (v.Reason == Allowed) != (v.Field == "") {
				t.Errorf("%s: got %+v", name, v)
			}
		}
		if d.Rule != rule || d.Reason != want || d.Allowed != (want == Allowed) || strings.Join(fields, ", ") != all {
			t.Errorf("%s: got %+v, want rule %d, %q, %q", name, d, rule, want, all)
		}
		if q.At.IsZero() && want != RefusedRate && want != RefusedDaily {
			if got := p.Check(q.Client, q.Op, q.Key, q.Scheme, q.SNI); got != want {
				t.Errorf("%s: Check says %q, Explain %q", name, got, want)
			}
		}
	}
	for _, tt := range tests {
		check(tt.name, p, tt.q, tt.rule, tt.want, tt.all)
		check(tt.name+", again", p, tt.q, tt.rule, tt.want, tt.all) // nothing was counted
	}
	p.take(edgeOne, OpTLSSign, p256, es256, "www.example.com")
	check("rate", p, tests[1].q, 2, RefusedRate, "1 windows, 2 rate, 3 schemes, 4 operations")
	later := tests[1].q
	later.At = c.Now().Add(3600e9)
	check("rate, later", p, later, 2, Allowed, "1 windows, 2 , 3 schemes, 4 operations")
	md5 := tests[9].q
	p.take(md5.Client, md5.Op, md5.Key, md5.Scheme, "")
	check("day", p, md5, 4, RefusedDaily, "1 operations, 2 operations, 3 operations, 4 daily")
	tomorrow := md5
	tomorrow.At = c.Now().Add(24 * 3600e9)
	check("tomorrow", p, tomorrow, 4, Allowed, "1 operations, 2 operations, 3 operations, 4 ")
	check("day, after looking at tomorrow", p, md5, 4, RefusedDaily, "1 operations, 2 operations, 3 operations, 4 daily")
	all, plain := mustPolicy(t, everything(edgeOne)), testRegistry(t, false)
	for name, tt := range map[string]struct {
		q    Query
		want Reason
	}{
		"type":                      {Query{Client: edgeOne, Op: OpSign, Key: rsaKey, Scheme: es256}, RefusedType},
		"decryption by another key": {Query{Client: edgeOne, Op: OpDecrypt, Key: p256}, RefusedType},
		"decryption":                {Query{Client: edgeOne, Op: OpDecrypt, Key: rsaKey}, Allowed},
		"decryption, off":           {Query{Client: edgeOne, Op: OpDecrypt, Key: plain.BySKI(rsaKey.SKI)}, RefusedDecrypt},
		"key that is not there now": {Query{Client: edgeOne, Op: OpDecrypt, Key: &Entry{Labels: []string{"rsa"}}}, Allowed},
	} {
		if d := all.Explain(tt.q); d.Reason != tt.want || d.Allowed != (tt.want == Allowed) || (d.Rules[0].Field == "keys") == d.Allowed {
			t.Errorf("%s: got %+v, want %q", name, d, tt.want)
		}
	}
	if d := (*Policy)(nil).Explain(tests[1].q); d.Allowed || d.Rule != -1 || d.Reason != RefusedClient {
		t.Errorf("no policy: got %+v", d)
	}
	both := policyOn(t, Options{}, everything(edgeOne)).And(mustPolicy(t, everything(edgeTwo)))
	if d := both.Explain(Query{Client: edgeOne, Op: OpSeal}); d.Allowed || d.Reason != RefusedClient {
		t.Errorf("both policies: got %+v", d)
	}
}

func TestParseWords(t *testing.T) {
	for i, word := range opNames {
		if op, ok := ParseOp(word); ok != (i > 0) || ok && op != Op(i) {
			t.Errorf("%s: got %v, %v", word, op, ok)
		}
	}
	for _, s := range schemes {
		if alg, ok := ParseAlgorithm(s.name); !ok || alg != s.alg {
			t.Errorf("%s: got %v, %v", s.name, alg, ok)
		}
	}
	if _, ok := ParseOp("export"); ok {
		t.Error("an unknown word is an operation")
	}
	if _, ok := ParseAlgorithm("*"); ok {
		t.Error("a star is an algorithm")
	}
}

// certified is a key with a certificate for the names.
type certified struct {
	Key
	names []string
}

func (k certified) Info() KeyInfo {
	info := k.Key.Info()
	info.Certificate = &x509.Certificate{DNSNames: k.names}
	return info
}

func TestWarnings(t *testing.T) {
	reg := NewRegistry()
	if err := reg.Replace([]Home{
		{Key: certified{memoryKey(t, "p256"), []string{"www.example.com", "*.shop.example"}}},
		{Key: memoryKey(t, "ed")},
		{Key: certified{memoryKey(t, "rsa"), []string{"www.example.org"}}, Decrypt: true},
	}); err != nil {
		t.Fatal(err)
	}
	on := Legacy{SHA1: true, MD5SHA1: true, Decrypt: true}
	good := ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"sign", "tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"www.Example.com."}}
	tests := []struct {
		name   string
		legacy Legacy
		edit   func(*ClientRule)
		want   string // fields
	}{
		{"good", Legacy{}, func(*ClientRule) {}, ""},
		{"star", Legacy{}, func(r *ClientRule) { r.Keys = []string{"*"} }, ""},
		{"missing key", Legacy{}, func(r *ClientRule) { r.Keys = []string{"p256", "gone"} }, "keys[1]"},
		{"missing SKI", Legacy{}, func(r *ClientRule) { r.Keys = []string{strings.Repeat("ab", 20)}; r.SNIs = []string{"x.example"} }, "keys[0]"},
		{"name of no certificate", Legacy{}, func(r *ClientRule) { r.SNIs = []string{"www.example.com", "www.example.net"} }, "snis[1]"},
		{"name below a wildcard", Legacy{}, func(r *ClientRule) { r.SNIs = []string{"a.shop.example", "*.shop.example", "*.example.com"} }, ""},
		{"name two below a wildcard", Legacy{}, func(r *ClientRule) { r.SNIs = []string{"a.b.shop.example", "shop.example", "*.b.shop.example"} }, "snis[0] snis[1] snis[2]"},
		{"key without a certificate", Legacy{}, func(r *ClientRule) { r.Keys = []string{"ed"}; r.SNIs = []string{"x.example"} }, ""},
		{"any name", Legacy{}, func(r *ClientRule) { r.SNIs = []string{"*"} }, ""},
		{"scheme of another key", Legacy{}, func(r *ClientRule) { r.Schemes = []string{"ecdsa_secp256r1_sha256", "ed25519"} }, "schemes[1]"},
		{"scheme that is switched off", Legacy{}, func(r *ClientRule) { r.Schemes = []string{"*", "ecdsa_sha1", "ecdsa_md5sha1"} }, "schemes[1] schemes[2]"},
		{"scheme that is switched on", on, func(r *ClientRule) { r.Schemes = []string{"*", "ecdsa_sha1", "ecdsa_md5sha1"} }, ""},
		{"decryption that is switched off", Legacy{}, func(r *ClientRule) {
			r.Keys = []string{"rsa"}
			r.SNIs = []string{"*"}
			r.Operations = []string{"sign", "decrypt"}
		}, "operations[1]"},
		{"decryption with a key that may not", on, func(r *ClientRule) { r.Operations = []string{"sign", "decrypt"} }, "operations[1]"},
		{"decryption", on, func(r *ClientRule) {
			r.Keys = []string{"rsa"}
			r.SNIs = []string{"*"}
			r.Operations = []string{"sign", "decrypt"}
		}, ""},
		{"no key needed", Legacy{}, func(r *ClientRule) { *r = ClientRule{ID: edgeOne, Operations: []string{"seal"}} }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			rule := good
			tt.edit(&rule)
			var got []string
			for _, err := range policyOn(t, Options{Legacy: tt.legacy}, ClientRule{ID: edgeTwo, Operations: []string{"ping"}}, rule).Warnings(reg) {
				var re *RuleError
				if !errors.As(err, &re) || re.Rule != 1 || !strings.Contains(re.Problem, ";") {
					t.Fatalf("got %v, want a fault of rule 1 with a remedy", err)
				}
				got = append(got, re.Key)
			}
			if slices.Sort(got); strings.Join(got, " ") != tt.want {
				t.Errorf("got %v, want %s", got, tt.want)
			}
		})
	}
	slow := good
	slow.Rate, slow.Operations = "1/s", []string{"sign"}
	for name, tt := range map[string]struct {
		edit func(*ClientRule) // of the rule beside it
		void bool
	}{
		"the same":     {func(r *ClientRule) {}, true},
		"more":         {func(r *ClientRule) { r.Keys, r.SNIs = []string{"*"}, []string{"*"} }, true},
		"limited too":  {func(r *ClientRule) { r.Daily = 9 }, false},
		"other client": {func(r *ClientRule) { r.ID = edgeTwo }, false},
		"other key":    {func(r *ClientRule) { r.Keys, r.SNIs = []string{"ed"}, []string{"*"} }, false},
		"other name":   {func(r *ClientRule) { r.SNIs = []string{"*.example.com"} }, false},
		"less schemes": {func(r *ClientRule) { r.Schemes = []string{"ecdsa_secp256r1_sha256"} }, false},
		"other op":     {func(r *ClientRule) { r.Operations = []string{"tls-sign"} }, false},
		"at times":     {func(r *ClientRule) { r.Windows = []string{"06:00-07:00"} }, false},
	} {
		beside := good
		tt.edit(&beside)
		w := policyOn(t, Options{}, slow, beside).Warnings(reg)
		var re *RuleError
		if void := len(w) == 1 && errors.As(w[0], &re) && re.Rule == 0 && re.Key == "rate" && strings.Contains(re.Problem, "clients[1]"); void != tt.void || len(w) > 1 {
			t.Errorf("a rule beside a limit, %s: got %v", name, w)
		}
	}
	if w := (*Policy)(nil).Warnings(reg); w != nil {
		t.Errorf("no policy: got %v", w)
	}
}
