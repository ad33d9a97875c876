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
	source  []ClientRule
	legacy  Legacy
	off     schemeSet // what the server's switches forbid, whatever the rules say
	clock   func() time.Time
	quotas  *Quotas
	and     *Policy // if not nil, must allow it too
}

type rule struct {
	index    int    // in the configuration
	ops      uint32 // bit n: Op(n)
	schemes  schemeSet
	allKeys  bool
	skis     map[keyless.SKI]struct{}
	labels   map[string]struct{}
	allSNIs  bool
	exact    map[string]struct{}
	suffixes map[string]struct{} // "example.com" for "*.example.com"
	windows  []Window            // none: always
	limit    limit
}

// NewPolicy compiles rules. The error joins one *[RuleError] for each fault; a rule whose operations need a list that is empty is a
// fault, because such a rule could never admit anybody.
func NewPolicy(rules []ClientRule, o Options) (*Policy, error) {
	p := &Policy{clients: make(map[string][]rule), source: slices.Clone(rules), legacy: o.Legacy, off: o.Legacy.off(), clock: o.Clock, quotas: o.Quotas}
	if p.clock == nil {
		p.clock = time.Now
	}
	if p.quotas == nil {
		p.quotas = new(Quotas)
	}
	var errs []error
	limits := limiter{quotas: p.quotas, seen: make(map[quotaKey]int)}
	for i, cr := range rules {
		c := compiler{rule: i, limits: &limits}
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
	both := *p
	both.and = q
	return &both
}

type compiler struct {
	rule   int
	limits *limiter
	errs   []error
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
	r := rule{index: c.rule}
	needsKey, signs := c.operations(cr, &r)
	c.keys(cr, &r, needsKey)
	c.schemes(cr, &r, signs)
	c.snis(cr, &r, needsKey)
	c.windows(cr, &r)
	c.limit(cr, &r)
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

func (c *compiler) windows(cr ClientRule, r *rule) {
	for j, word := range cr.Windows {
		w, err := ParseWindow(word)
		if err != nil {
			c.fault(fmt.Sprintf("windows[%d]", j), "%v", err)
			continue
		}
		r.windows = append(r.windows, w)
	}
}

func (c *compiler) limit(cr ClientRule, r *rule) {
	var rate Rate
	if cr.Rate != "" {
		var err error
		if rate, err = ParseRate(cr.Rate); err != nil {
			c.fault("rate", "%v", err)
		}
	}
	if cr.Daily < 0 {
		c.fault("daily", "%d operations a day; write how many the rule allows, or leave it out for no limit", cr.Daily)
	}
	if len(c.errs) == 0 {
		r.limit = c.limits.limit(cr.ID, rate, cr.Daily)
	}
}
