package signer

import (
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"
)

// A Query is a question to a policy: may this be done?
type Query struct {
	Client string    // the client's identity
	Op     Op        // what it wants to do
	Key    *Entry    // with which key, if the operation has one
	Scheme Algorithm // how, if the operation signs
	SNI    string    // for which server name, if the operation has one
	At     time.Time // when; zero is now
}

// A Decision is a policy's answer to a [Query].
type Decision struct {
	Allowed bool
	Reason  Reason        // why not
	Rule    int           // index of the rule that allows it, or that came nearest; -1 if no rule names the client
	Rules   []RuleVerdict // what each of the client's rules says, in their order
}

// A RuleVerdict is what one rule says to a [Query].
type RuleVerdict struct {
	Rule   int    // index of the rule
	Reason Reason // why the rule does not allow it; Allowed if it does
	Field  string // the value that stands against it: "keys", "windows", "legacy.decrypt"; "" if none
}

// ParseOp returns the operation of that word, and false if there is none.
func ParseOp(word string) (Op, bool) {
	i := slices.Index(opNames[:], word)
	return Op(max(i, 0)), i > 0
}

// ParseAlgorithm returns the algorithm of that name, as [Algorithm.String] returns it, and false if there is none.
func ParseAlgorithm(name string) (Algorithm, bool) {
	for i := range schemes {
		if schemes[i].name == name {
			return schemes[i].alg, true
		}
	}
	return Algorithm{}, false
}

// Explain answers the query as a request with this policy would be answered, and says what each rule has to do with it. It counts nothing; whether something is left of
// a rate or a day is read from the policy's [Quotas].
func (p *Policy) Explain(q Query) Decision {
	d := Decision{Reason: RefusedClient, Rule: -1}
	if p == nil {
		return d
	}
	at := p.when(q.At)
	ask := question{op: q.Op, key: q.Key, bit: q.Op.bit(q.Scheme), sni: q.SNI}
	var buf [maxSNI]byte
	ask.name, ask.host = canonicalSNI(buf[:0], q.SNI)
	for i := range p.clients[q.Client] {
		r := &p.clients[q.Client][i]
		v := p.verdict(r, &ask, q.Scheme, at)
		d.Rules = append(d.Rules, v)
		if d.Rule < 0 || !d.Allowed && (v.Reason == Allowed || nearer(v.Reason, d.Reason) != d.Reason) {
			d.Allowed, d.Reason, d.Rule = v.Reason == Allowed, v.Reason, r.index
		}
	}
	if d.Allowed && p.and != nil {
		return p.and.Explain(q)
	}
	return d
}

var fields = map[Reason]string{
	RefusedOp: "operations", RefusedKey: "keys", RefusedSNI: "snis", RefusedWindow: "windows", RefusedScheme: "schemes",
	RefusedRate: "rate", RefusedDaily: "daily", RefusedType: "keys", RefusedDecrypt: "keys",
}

// unfit reports why a key that the registry holds cannot do what is asked.
func (q *question) unfit(alg Algorithm) Reason {
	switch {
	case q.key == nil || len(q.key.Homes) == 0:
		return Allowed
	case q.op.signs() && !Fits(q.key.public, alg):
		return RefusedType
	case q.op == OpDecrypt && !q.key.MayDecrypt():
		return RefusedDecrypt
	case q.op == OpDecrypt:
		if _, ok := q.key.public.(*rsa.PublicKey); !ok {
			return RefusedType
		}
	}
	return Allowed
}

func (p *Policy) verdict(r *rule, q *question, alg Algorithm, at time.Time) RuleVerdict {
	v := RuleVerdict{Rule: r.index}
	bit := q.bit
	if v.Reason = p.match(r, q, at); v.Reason == Allowed && r.set(q.op)&bit == 0 {
		v.Reason = RefusedScheme // an algorithm that nothing signs with
	}
	if v.Reason == Allowed && p.off&bit != 0 {
		v.Reason, v.Field = RefusedLegacy, p.legacy.switchOf(bit)
		return v
	}
	if v.Reason == Allowed {
		v.Reason = q.unfit(alg)
	}
	if v.Reason == Allowed && r.limit.set() {
		v.Reason = p.quotas.peek(r.limit, at)
	}
	v.Field = fields[v.Reason]
	return v
}

// Warnings names what the rules hold that can never match anything in the registry as it is now: keys that no home holds, server names that
// are in no certificate of the rule's keys, operations and schemes that a switch or the keys rule out; and limits that limit nothing. Each is a *[RuleError] with a remedy. A name is
// warned about only if all of the rule's keys have certificates to compare it with.
func (p *Policy) Warnings(reg *Registry) []error {
	if p == nil {
		return nil
	}
	var w []error
	for i := range p.source {
		c := compiler{rule: i}
		c.warn(&p.source[i], reg, p.legacy)
		c.warnLimit(p.clients[p.source[i].ID])
		w = append(w, c.errs...)
	}
	return w
}

// warnLimit tells of a limit that another of the client's rules makes void, since rules add up.
func (c *compiler) warnLimit(rules []rule) {
	own := slices.IndexFunc(rules, func(r rule) bool { return r.index == c.rule })
	if own < 0 || !rules[own].limit.set() {
		return
	}
	void := slices.IndexFunc(rules, func(r rule) bool { return !r.limit.set() && r.covers(&rules[own]) })
	if void < 0 {
		return
	}
	field := "rate"
	if rules[own].limit.rate == nil {
		field = "daily"
	}
	c.fault(field, "limits nothing, as clients[%d] allows the same without a limit; limit that rule too, or take it out", rules[void].index)
}

// covers reports whether r allows at any time what o allows at some.
func (r *rule) covers(o *rule) bool {
	return len(r.windows) == 0 && o.ops&^r.ops == 0 && o.schemes&^r.schemes == 0 &&
		(r.allKeys || !o.allKeys && within(o.skis, r.skis) && within(o.labels, r.labels)) &&
		(r.allSNIs || !o.allSNIs && within(o.exact, r.exact) && within(o.suffixes, r.suffixes))
}

func within[K comparable](a, b map[K]struct{}) bool {
	for k := range a {
		if _, ok := b[k]; !ok {
			return false
		}
	}
	return true
}

func (c *compiler) warn(cr *ClientRule, reg *Registry, legacy Legacy) {
	signs, needsKey := false, false
	for _, word := range cr.Operations {
		op, _ := ParseOp(word)
		signs, needsKey = signs || op.signs(), needsKey || op.needsKey()
	}
	if !needsKey {
		return
	}
	keys := c.warnKeys(cr, reg)
	if j := slices.Index(cr.Operations, OpDecrypt.String()); j >= 0 {
		c.warnDecrypt(j, keys, legacy)
	}
	if signs {
		c.warnSchemes(cr, keys, legacy)
	}
	c.warnNames(cr, keys)
}

// warnKeys returns the keys that the rule names.
func (c *compiler) warnKeys(cr *ClientRule, reg *Registry) []*Entry {
	if slices.Contains(cr.Keys, "*") {
		return reg.Entries()
	}
	var keys []*Entry
	for j, name := range cr.Keys {
		found := reg.ByName(name)
		if len(found) == 0 {
			c.fault(fmt.Sprintf("keys[%d]", j), "no home holds a key %q now; check its spelling, or that its token is there", name)
		}
		for _, e := range found {
			if !slices.Contains(keys, e) {
				keys = append(keys, e)
			}
		}
	}
	return keys
}

func (c *compiler) warnDecrypt(j int, keys []*Entry, legacy Legacy) {
	field := fmt.Sprintf("operations[%d]", j)
	switch {
	case !legacy.Decrypt:
		c.fault(field, "decryption is switched off on this server; set legacy.decrypt, or take the operation out")
	case len(keys) > 0 && !slices.ContainsFunc(keys, (*Entry).MayDecrypt):
		c.fault(field, "none of the rule's keys may decrypt; name one in decrypt of its home, or take the operation out")
	}
}

func (c *compiler) warnSchemes(cr *ClientRule, keys []*Entry, legacy Legacy) {
	for j, word := range cr.Schemes {
		set, _ := parseScheme(word)
		field := fmt.Sprintf("schemes[%d]", j)
		if name := legacy.switchOf(set); name != "" {
			c.fault(field, "%s is switched off on this server; set %s, or take the scheme out", word, name)
			continue
		}
		able := func(e *Entry) bool {
			return slices.ContainsFunc(schemes[:], func(s schemeEntry) bool { return set&s.alg.bit() != 0 && e.Supports(s.alg) })
		}
		if len(keys) > 0 && !slices.ContainsFunc(keys, able) {
			c.fault(field, "none of the rule's keys can sign with %s; take it out, or name the key that can", word)
		}
	}
}

func (c *compiler) warnNames(cr *ClientRule, keys []*Entry) {
	var names []string
	for _, e := range keys {
		certificate := e.certificate()
		if certificate == nil {
			return
		}
		names = append(names, certificate.DNSNames...)
	}
	for j, pattern := range cr.SNIs {
		if pattern == "*" || len(keys) == 0 || slices.ContainsFunc(names, func(n string) bool { return meet(pattern, n) }) {
			continue
		}
		c.fault(fmt.Sprintf("snis[%d]", j), "no certificate of the rule's keys is for %q; correct the name, or name the key whose certificate it is in", pattern)
	}
}

// certificate returns the certificate that a home has beside the key, or nil.
func (e *Entry) certificate() *x509.Certificate {
	for _, h := range e.Homes {
		if c := h.Key.Info().Certificate; c != nil {
			return c
		}
	}
	return nil
}

// meet reports whether there is a host name that both patterns stand for. A "*" stands for one label, as in certificates.
func meet(a, b string) bool {
	canonical := func(s string) string { return strings.ToLower(strings.TrimSuffix(s, ".")) }
	a, b = canonical(a), canonical(b)
	first, baseA, _ := strings.Cut(a, ".")
	other, baseB, _ := strings.Cut(b, ".")
	return a == b || baseA == baseB && baseA != "" && (first == "*" || other == "*")
}
