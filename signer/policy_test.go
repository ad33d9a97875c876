package signer

import (
	"crypto"
	"errors"
	"strings"
	"testing"
)

func TestPolicyCheck(t *testing.T) {
	reg := testRegistry(t, false)
	p256, rsaKey := reg.BySKI(skiOf(t, "p256")), reg.BySKI(skiOf(t, "rsa"))
	es256, pss256 := Algorithm{ECDSA, crypto.SHA256}, Algorithm{PSS, crypto.SHA256}
	p := mustPolicy(t,
		ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"tls-sign"}, Schemes: []string{"ecdsa_secp256r1_sha256"}, SNIs: []string{"www.Example.com.", "*.shop.example"}},
		ClientRule{ID: edgeOne, Keys: []string{strings.ToUpper(rsaKey.SKI.String())}, Operations: []string{"sign", "decrypt"}, Schemes: []string{"*"}, SNIs: []string{"*"}},
		ClientRule{ID: edgeTwo, Operations: []string{"ping", "seal"}},
	)
	tests := []struct {
		name string
		id   string
		op   Op
		key  *Entry
		alg  Algorithm
		sni  string
		want Reason
	}{
		{"exact name", edgeOne, OpTLSSign, p256, es256, "www.example.com", Allowed},
		{"upper case and trailing dot", edgeOne, OpTLSSign, p256, es256, "WWW.EXAMPLE.COM.", Allowed},
		{"wildcard", edgeOne, OpTLSSign, p256, es256, "a.shop.example", Allowed},
		{"wildcard, two labels", edgeOne, OpTLSSign, p256, es256, "a.b.shop.example", RefusedSNI},
		{"wildcard, no label", edgeOne, OpTLSSign, p256, es256, "shop.example", RefusedSNI},
		{"wildcard, empty label", edgeOne, OpTLSSign, p256, es256, ".shop.example", RefusedSNI},
		{"two trailing dots", edgeOne, OpTLSSign, p256, es256, "www.example.com..", RefusedSNI},
		{"prefix of the name", edgeOne, OpTLSSign, p256, es256, "ww.example.com", RefusedSNI},
		{"name with a zero byte", edgeOne, OpTLSSign, p256, es256, "www.example.com\x00", RefusedSNI},
		{"no name", edgeOne, OpTLSSign, p256, es256, "", RefusedSNI},
		{"other scheme", edgeOne, OpTLSSign, p256, Algorithm{ECDSA, crypto.SHA384}, "www.example.com", RefusedScheme},
		{"operation of the other rule", edgeOne, OpSign, p256, es256, "www.example.com", RefusedKey},
		{"key of the other rule", edgeOne, OpTLSSign, rsaKey, pss256, "www.example.com", RefusedKey},
		{"second rule, by SKI", edgeOne, OpSign, rsaKey, pss256, "", Allowed},
		{"any name is still a name", edgeOne, OpSign, rsaKey, pss256, "not a name", RefusedSNI},
		{"star has no SHA-1", edgeOne, OpSign, rsaKey, Algorithm{PKCS1v15, crypto.SHA1}, "", RefusedScheme},
		{"star has no MD5", edgeOne, OpSign, rsaKey, Algorithm{PKCS1v15, crypto.MD5SHA1}, "", RefusedScheme},
		{"decrypt", edgeOne, OpDecrypt, rsaKey, Algorithm{}, "", Allowed},
		{"decrypt, other key", edgeOne, OpDecrypt, p256, Algorithm{}, "", RefusedKey},
		{"seal without the operation", edgeOne, OpSeal, nil, Algorithm{}, "", RefusedOp},
		{"seal", edgeTwo, OpSeal, nil, Algorithm{}, "", Allowed},
		{"sign without the operation", edgeTwo, OpSign, p256, es256, "www.example.com", RefusedOp},
		{"no operation", edgeTwo, OpNone, nil, Algorithm{}, "", RefusedOp},
		{"missing key", edgeOne, OpSign, nil, es256, "", RefusedKey},
		{"unknown client", "spiffe://keys.example/edge/three", OpSeal, nil, Algorithm{}, "", RefusedClient},
		{"no client", "", OpSeal, nil, Algorithm{}, "", RefusedClient},
		{"identity in other case", strings.ToUpper(edgeTwo), OpSeal, nil, Algorithm{}, "", RefusedClient},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := p.Check(tt.id, tt.op, tt.key, tt.alg, tt.sni); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestEmptyPolicyAdmitsNobody(t *testing.T) {
	for name, p := range map[string]*Policy{"nil": nil, "zero": {}, "no rules": mustPolicy(t)} {
		if p.Admits(edgeOne) || p.Check(edgeOne, OpPing, nil, Algorithm{}, "") == Allowed {
			t.Errorf("%s: somebody was admitted", name)
		}
	}
}

func TestPolicyErrors(t *testing.T) {
	good := ClientRule{ID: edgeOne, Keys: []string{"*"}, Operations: []string{"sign"}, Schemes: []string{"*"}, SNIs: []string{"*"}}
	tests := []struct {
		name string
		edit func(*ClientRule)
		key  string
	}{
		{"no id", func(r *ClientRule) { r.ID = "" }, "id"},
		{"star for id", func(r *ClientRule) { r.ID = "*" }, "id"},
		{"name for id", func(r *ClientRule) { r.ID = "edge-one" }, "id"},
		{"no operations", func(r *ClientRule) { r.Operations = nil }, "operations"},
		{"unknown operation", func(r *ClientRule) { r.Operations = []string{"sign", "export"} }, "operations[1]"},
		{"none is no operation", func(r *ClientRule) { r.Operations = []string{"none"} }, "operations[0]"},
		{"star is no operation", func(r *ClientRule) { r.Operations = []string{"*"} }, "operations[0]"},
		{"no keys", func(r *ClientRule) { r.Keys = nil }, "keys"},
		{"empty key", func(r *ClientRule) { r.Keys = []string{""} }, "keys[0]"},
		{"no schemes", func(r *ClientRule) { r.Schemes = nil }, "schemes"},
		{"unknown scheme", func(r *ClientRule) { r.Schemes = []string{"rsa"} }, "schemes[0]"},
		{"no names", func(r *ClientRule) { r.SNIs = nil }, "snis"},
		{"bad name", func(r *ClientRule) { r.SNIs = []string{"a.example", "http://b"} }, "snis[1]"},
		{"star inside", func(r *ClientRule) { r.SNIs = []string{"a.*.example"} }, "snis[0]"},
		{"two stars", func(r *ClientRule) { r.SNIs = []string{"*.*.example"} }, "snis[0]"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bad := good
			tt.edit(&bad)
			p, err := NewPolicy([]ClientRule{good, bad}, Options{})
			var re *RuleError
			if !errors.As(err, &re) || p != nil {
				t.Fatalf("got policy %v, error %v; want a *RuleError", p, err)
			}
			if re.Rule != 1 || re.Key != tt.key || re.Problem == "" {
				t.Errorf("got fault in rule %d, %s; want rule 1, %s", re.Rule, re.Key, tt.key)
			}
		})
	}
	if _, err := NewPolicy([]ClientRule{good, {}, {ID: "x"}}, Options{}); strings.Count(err.Error(), "\n") != 3 {
		t.Errorf("got %v; want every fault of every rule", err)
	}
}

func TestPolicyCheckDoesNotAllocate(t *testing.T) {
	reg := testRegistry(t, false)
	key := reg.BySKI(skiOf(t, "p256"))
	p := mustPolicy(t, ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"*.example.com"}})
	n := testing.AllocsPerRun(100, func() {
		if r := p.Check(edgeOne, OpTLSSign, key, Algorithm{ECDSA, crypto.SHA256}, "WWW.Example.com"); r != Allowed {
			t.Fatal(r)
		}
	})
	if n != 0 {
		t.Errorf("got %v allocations, want none", n)
	}
}

func BenchmarkPolicyCheck(b *testing.B) {
	reg := testRegistry(b, false)
	key := reg.BySKI(skiOf(b, "p256"))
	p := mustPolicy(b, ClientRule{ID: edgeOne, Keys: []string{"p256"}, Operations: []string{"tls-sign"}, Schemes: []string{"*"}, SNIs: []string{"*.example.com"}})
	b.ReportAllocs()
	for b.Loop() {
		p.Check(edgeOne, OpTLSSign, key, Algorithm{ECDSA, crypto.SHA256}, "www.example.com")
	}
}

// FuzzSNI holds canonical names to be stable: an attacker who controls the SNI must not find a second spelling.
func FuzzSNI(f *testing.F) {
	for _, s := range []string{"www.example.com", "WWW.Example.com.", "a..b", "-a.b", "xn--bcher-kva.example", "", ".", "1.2.3.4"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		var buf, buf2 [maxSNI]byte
		got, ok := canonicalSNI(buf[:0], s)
		if !ok {
			return
		}
		again, ok := canonicalSNI(buf2[:0], string(got))
		if !ok || string(again) != string(got) {
			t.Errorf("canonical form of %q is %q, and of that %q, %v", s, got, again, ok)
		}
		if !strings.EqualFold(strings.TrimSuffix(s, "."), string(got)) {
			t.Errorf("canonical form of %q is %q", s, got)
		}
	})
}

// TestPolicyAnd checks the policy in force while keys are exchanged.
func TestPolicyAnd(t *testing.T) {
	rule := func(id, key, op string, schemes ...string) ClientRule {
		return ClientRule{ID: id, Keys: []string{key}, Operations: []string{op}, Schemes: schemes, SNIs: []string{"*"}}
	}
	compile := func(rules ...ClientRule) *Policy {
		p, err := NewPolicy(rules, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	const one, two = "spiffe://x/edge/one", "spiffe://x/edge/two"
	p256, p384 := Algorithm{ECDSA, crypto.SHA256}, Algorithm{ECDSA, crypto.SHA384}
	before := compile(rule(one, "*", "tls-sign", "*"), rule(two, "*", "tls-sign", "*"))
	after := compile(rule(one, "www", "tls-sign", "ecdsa_secp256r1_sha256"), rule(one, "www", "renew"))
	www, fresh := &Entry{Labels: []string{"www"}}, &Entry{Labels: []string{"new"}}
	for name, both := range map[string]*Policy{
		"before and after": before.And(after), "after and before": after.And(before), "three": before.And(before).And(after),
	} {
		for _, tc := range []struct {
			id   string
			op   Op
			key  *Entry
			alg  Algorithm
			want Reason
		}{
			{one, OpTLSSign, www, p256, Allowed},
			{one, OpTLSSign, www, p384, RefusedScheme},
			{one, OpTLSSign, fresh, p256, RefusedKey},
			{one, OpRenew, nil, Algorithm{}, RefusedOp},
			{two, OpTLSSign, www, p256, RefusedClient},
		} {
			if got := both.Check(tc.id, tc.op, tc.key, tc.alg, "www.example.com"); got != tc.want {
				t.Errorf("%s: %s %v %v: got %q, want %q", name, tc.id, tc.op, tc.key, got, tc.want)
			}
		}
		if both.Admits(two) || !both.Admits(one) {
			t.Errorf("%s: admits the wrong clients", name)
		}
	}
	off, on := compile(everything(one)), policyOn(t, Options{Legacy: Legacy{SHA1: true}}, everything(one))
	for name, both := range map[string]*Policy{"on and off": on.And(off), "off and on": off.And(on), "three": on.And(on).And(off)} {
		if got := both.Check(one, OpSign, www, Algorithm{PKCS1v15, crypto.SHA1}, "www.example.com"); got != RefusedLegacy {
			t.Errorf("%s: got %q, want both switches to count", name, got)
		}
		if d := both.Explain(Query{Client: one, Op: OpSign, Key: www, Scheme: Algorithm{PKCS1v15, crypto.SHA1}, SNI: "www.example.com"}); d.Reason != RefusedLegacy {
			t.Errorf("%s: explained as %+v", name, d)
		}
	}
	for _, none := range []*Policy{before.And(nil), (*Policy)(nil).And(before)} {
		if none.Admits(one) {
			t.Error("a policy and none admit somebody")
		}
	}
}
