package signer

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/keyless"
)

// Op is something a client can be allowed to do.
type Op byte

// The operations, with the words that a [ClientRule] uses for them.
const (
	OpNone    Op = iota
	OpPing       // "ping": connect and ping, for monitors; any rule brings it
	OpTLSSign    // "tls-sign": context-bound signing, keyless.FuncTLSSign
	OpSign       // "sign": the plain signing opcodes, which sign any digest
	OpDecrypt    // "decrypt": raw RSA decryption; the key must allow it too
	OpSeal       // "seal": seal and unseal opaque blobs
	OpRenew      // "renew": a new certificate for the client's own identity, keyless.FuncRenew
)

var opNames = [...]string{"none", "ping", "tls-sign", "sign", "decrypt", "seal", "renew"}

// String returns the operation's word.
func (o Op) String() string {
	if int(o) < len(opNames) {
		return opNames[o]
	}
	return "none"
}

// needsKey reports whether the operation uses a private key of the registry.
func (o Op) needsKey() bool { return o == OpTLSSign || o == OpSign || o == OpDecrypt }

// signs reports whether the operation has a signature scheme.
func (o Op) signs() bool { return o == OpTLSSign || o == OpSign }

// ClientRule allows one client something. Several rules for one client add up, each for itself: a key of one rule is
// not combined with an operation of another. Nothing is allowed by leaving something out.
type ClientRule struct {
	// ID is the client's identity: the URI SAN of its certificate.
	ID string `mapstructure:"id"`
	// Keys holds SKIs in hex and labels. A label stands for every key that carries it. "*" is every key.
	Keys []string `mapstructure:"keys"`
	// Operations holds the words of [Op].
	Operations []string `mapstructure:"operations"`
	// Schemes holds names as [Algorithm.String] returns them. "*" is all of them but those with MD5, SHA-1 and SHA-224.
	Schemes []string `mapstructure:"schemes"`
	// SNIs holds exact host names and "*.suffix", which stands for one label more, as in certificates. "*" is every name, and none.
	SNIs []string `mapstructure:"snis"`
	// Windows holds when the rule holds, as [ParseWindow] reads it: "Mon-Fri 06:00-22:00 Europe/Zurich". None is always.
	Windows []string `mapstructure:"windows"`
	// Rate is how often the rule may be used, as [ParseRate] reads it: "100/s burst 200". "" is without limit.
	Rate string `mapstructure:"rate"`
	// Daily is how many operations the rule allows in a day of UTC. 0 is without limit.
	Daily int64 `mapstructure:"daily"`
}

// Legacy holds the server's own switches for what is too weak to be allowed by a rule alone. The zero value has all of it off.
type Legacy struct {
	SHA1    bool // signatures over SHA-1
	MD5SHA1 bool // signatures over MD5 and SHA-1, as TLS up to 1.1 makes them
	Decrypt bool // raw RSA decryption
}

// Options is what a [Policy] needs besides its rules. The zero value has nothing of the past switched on.
type Options struct {
	Legacy Legacy
	// Clock is what windows, rates and days go by; nil is time.Now.
	Clock func() time.Time
	// Quotas holds the counters of rates and days. Policies that follow each other share it, so that a reload gives nobody a new budget; nil
	// makes one for this policy alone.
	Quotas *Quotas
}

// A RuleError says which value of which rule is wrong.
type RuleError struct {
	Rule    int    // index of the rule
	Key     string // the value in the rule, such as "operations[1]"
	Problem string // what is wrong and what to do
}

// Error names rule, value and remedy.
func (e *RuleError) Error() string {
	return fmt.Sprintf("signer: clients[%d].%s: %s", e.Rule, e.Key, e.Problem)
}

// Policy is a compiled, immutable set of rules. Checks take no lock and allocate nothing. A nil Policy, and one without
// rules, admits nobody.
type Policy struct {
	clients map[string][]rule
	and     *Policy // if not nil, must allow it too
}

type rule struct {
	ops      uint32 // bit n: Op(n)
	schemes  schemeSet
	allKeys  bool
	skis     map[keyless.SKI]struct{}
	labels   map[string]struct{}
	allSNIs  bool
	exact    map[string]struct{}
	suffixes map[string]struct{} // "example.com" for "*.example.com"
}

// NewPolicy compiles rules. The error joins one *[RuleError] for each fault; a rule whose operations need a list that is empty is a
// fault, because such a rule could never admit anybody.
func NewPolicy(rules []ClientRule, o Options) (*Policy, error) {
	p := &Policy{clients: make(map[string][]rule)}
	var errs []error
	for i, cr := range rules {
		c := compiler{rule: i}
		r := c.compile(cr)
		if len(c.errs) > 0 {
			errs = append(errs, c.errs...)
			continue
		}
		p.clients[cr.ID] = append(p.clients[cr.ID], r)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return p, nil
}

// And returns the policy that allows what p and q both allow, for the moment in which keys are exchanged. It is nobody's
// if either is nil.
func (p *Policy) And(q *Policy) *Policy {
	if p == nil || q == nil {
		return nil
	}
	if p.and != nil {
		q = p.and.And(q)
	}
	return &Policy{clients: p.clients, and: q}
}

type compiler struct {
	rule int
	errs []error
}

func (c *compiler) fault(key, format string, args ...any) {
	c.errs = append(c.errs, &RuleError{Rule: c.rule, Key: key, Problem: fmt.Sprintf(format, args...)})
}

func (c *compiler) compile(cr ClientRule) rule {
	if cr.ID == "" {
		c.fault("id", "is empty; write the URI of the client's certificate, such as spiffe://keys.example/edge/one")
	} else if cr.ID == "*" || strings.ContainsAny(cr.ID, " \t\r\n") || !strings.Contains(cr.ID, "://") {
		c.fault("id", "%q is not an identity; write the whole URI of the client's certificate, such as spiffe://keys.example/edge/one", cr.ID)
	}
	var r rule
	needsKey, signs := c.operations(cr, &r)
	c.keys(cr, &r, needsKey)
	c.schemes(cr, &r, signs)
	c.snis(cr, &r, needsKey)
	return r
}

func (c *compiler) operations(cr ClientRule, r *rule) (needsKey, signs bool) {
	if len(cr.Operations) == 0 {
		c.fault("operations", "is empty and admits nobody; name operations: %s", strings.Join(opNames[1:], ", "))
	}
	for j, word := range cr.Operations {
		op := Op(slices.Index(opNames[:], word))
		if slices.Index(opNames[:], word) <= 0 {
			c.fault(fmt.Sprintf("operations[%d]", j), "unknown operation %q; known are: %s", word, strings.Join(opNames[1:], ", "))
			continue
		}
		r.ops |= 1 << op
		needsKey = needsKey || op.needsKey()
		signs = signs || op.signs()
	}
	return needsKey, signs
}

func (c *compiler) keys(cr ClientRule, r *rule, needed bool) {
	if needed && len(cr.Keys) == 0 {
		c.fault("keys", `is empty and admits nobody; name keys by SKI or label, or write "*"`)
	}
	r.skis, r.labels = make(map[keyless.SKI]struct{}), make(map[string]struct{})
	for j, word := range cr.Keys {
		switch {
		case word == "*":
			r.allKeys = true
		case word == "":
			c.fault(fmt.Sprintf("keys[%d]", j), "is empty; write an SKI of 40 hex digits or a label")
		default:
			if ski, err := keyless.ParseSKI(word); err == nil {
				r.skis[ski] = struct{}{}
			} else {
				r.labels[word] = struct{}{}
			}
		}
	}
}

func (c *compiler) schemes(cr ClientRule, r *rule, needed bool) {
	if needed && len(cr.Schemes) == 0 {
		c.fault("schemes", `is empty and admits nobody; name signature schemes, or write "*"`)
	}
	for j, word := range cr.Schemes {
		set, ok := parseScheme(word)
		if !ok {
			c.fault(fmt.Sprintf("schemes[%d]", j), "unknown signature scheme %q; known are: %s", word, schemeNames())
		}
		r.schemes |= set
	}
}

func (c *compiler) snis(cr ClientRule, r *rule, needed bool) {
	if needed && len(cr.SNIs) == 0 {
		c.fault("snis", `is empty and admits nobody; name hosts, or write "*"`)
	}
	r.exact, r.suffixes = make(map[string]struct{}), make(map[string]struct{})
	for j, word := range cr.SNIs {
		if word == "*" {
			r.allSNIs = true
			continue
		}
		var buf [maxSNI]byte
		base, wild := strings.CutPrefix(word, "*.")
		name, ok := canonicalSNI(buf[:0], base)
		switch {
		case !ok:
			c.fault(fmt.Sprintf("snis[%d]", j), `%q is no host name; write one such as www.example.com, "*.example.com" or "*"`, word)
		case wild:
			r.suffixes[string(name)] = struct{}{}
		default:
			r.exact[string(name)] = struct{}{}
		}
	}
}

// A Reason says why a request was refused, for records. It never crosses the wire.
type Reason string

// The reasons of a policy. The empty Reason means: allowed.
const (
	Allowed       Reason = ""
	RefusedClient Reason = "client unknown"
	RefusedOp     Reason = "operation not allowed"
	RefusedKey    Reason = "key not allowed"
	RefusedSNI    Reason = "server name not allowed"
	RefusedWindow Reason = "outside the time window"
	RefusedScheme Reason = "scheme not allowed"
	RefusedLegacy Reason = "switched off on this server"
	RefusedRate   Reason = "rate is used up"
	RefusedDaily  Reason = "budget of the day is used up"
)

// Admits reports whether any rule names the client, so that it may connect.
func (p *Policy) Admits(id string) bool {
	return p != nil && len(p.clients[id]) > 0 && (p.and == nil || p.and.Admits(id))
}

// Check decides whether the client may do op with the key for the server name, signing with the algorithm. Key, algorithm and server
// name are looked at only if the operation has them. It does not allocate.
func (p *Policy) Check(id string, op Op, key *Entry, alg Algorithm, sni string) Reason {
	set, reason := p.grant(id, op, key, sni)
	if reason == Allowed && op.signs() && set&alg.bit() == 0 {
		return RefusedScheme
	}
	return reason
}

// grant returns the schemes that the client may use with key and name. If there is none, the reason is that of the rule that came nearest.
func (p *Policy) grant(id string, op Op, key *Entry, sni string) (schemeSet, Reason) {
	set, reason := p.ownGrant(id, op, key, sni)
	if reason != Allowed || p.and == nil {
		return set, reason
	}
	other, reason := p.and.grant(id, op, key, sni)
	return set & other, reason
}

func (p *Policy) ownGrant(id string, op Op, key *Entry, sni string) (schemeSet, Reason) {
	if !p.Admits(id) {
		return 0, RefusedClient
	}
	var (
		buf     [maxSNI]byte
		set     schemeSet
		granted bool
		reason  = RefusedOp
	)
	name, valid := canonicalSNI(buf[:0], sni)
	rules := p.clients[id]
	for i := range rules {
		r := &rules[i]
		switch {
		case r.ops&(1<<op) == 0:
		case !op.needsKey():
			return 0, Allowed
		case !r.admitsKey(key):
			if reason == RefusedOp {
				reason = RefusedKey
			}
		case !r.admitsSNI(name, valid, sni == ""):
			reason = RefusedSNI
		default:
			granted = true
			set |= r.schemes
		}
	}
	if !granted {
		return 0, reason
	}
	return set, Allowed
}

func (r *rule) admitsKey(e *Entry) bool {
	if e == nil {
		return false
	}
	if r.allKeys {
		return true
	}
	if _, ok := r.skis[e.SKI]; ok {
		return true
	}
	for _, l := range e.Labels {
		if _, ok := r.labels[l]; ok {
			return true
		}
	}
	return false
}

// admitsSNI takes a canonical name. A request without a name passes only "*", as does a text that is no host name, never.
func (r *rule) admitsSNI(name []byte, valid, absent bool) bool {
	if absent {
		return r.allSNIs
	}
	if !valid {
		return false
	}
	if r.allSNIs {
		return true
	}
	if _, ok := r.exact[string(name)]; ok {
		return true
	}
	for i, b := range name {
		if b == '.' {
			_, ok := r.suffixes[string(name[i+1:])]
			return ok
		}
	}
	return false
}

// maxSNI is the longest host name, RFC 1035 section 2.3.4, with a trailing dot.
const maxSNI = 254

// canonicalSNI appends the host name in lower case and without a trailing dot. It reports false for a text that is no host name (RFC 1123
// section 2.1, with the underscore that is seen in practice).
func canonicalSNI(dst []byte, name string) ([]byte, bool) {
	name = strings.TrimSuffix(name, ".")
	if name == "" || len(name) >= maxSNI {
		return dst, false
	}
	label := 0
	for i := range len(name) {
		b := name[i]
		switch {
		case b == '.':
			if label == 0 || name[i-1] == '-' {
				return dst, false
			}
			label = -1
		case 'A' <= b && b <= 'Z':
			b += 'a' - 'A'
		case 'a' <= b && b <= 'z', '0' <= b && b <= '9', b == '_':
		case b == '-':
			if label == 0 {
				return dst, false
			}
		default:
			return dst, false
		}
		if label++; label > 63 {
			return dst, false
		}
		dst = append(dst, b)
	}
	return dst, label > 0 && name[len(name)-1] != '-'
}
