package signer

import (
	"strings"
	"time"
)

// A Reason says why a request was refused, for records. It never crosses the wire.
type Reason string

// The reasons of a policy, each of which comes nearer to being allowed than the one before. The empty Reason means: allowed.
const (
	Allowed       Reason = ""
	RefusedClient Reason = "client unknown"
	RefusedOp     Reason = "operation not allowed"
	RefusedKey    Reason = "key not allowed"
	RefusedSNI    Reason = "server name not allowed"
	RefusedWindow Reason = "outside the time window"
	RefusedScheme Reason = "scheme not allowed"
	RefusedLegacy Reason = "switched off on this server"
	RefusedDaily  Reason = "budget of the day is used up"
	RefusedRate   Reason = "rate is used up"
)

// Reasons that lie with the key. A [Service] finds them by itself; a policy has them in [Policy.Explain] alone.
const (
	RefusedType    Reason = "does not fit the key's type"
	RefusedDecrypt Reason = "decryption is off for this key"
)

// reasons holds the reasons in their order.
var reasons = [...]Reason{RefusedClient, RefusedOp, RefusedKey, RefusedSNI, RefusedWindow, RefusedScheme, RefusedLegacy, RefusedType, RefusedDecrypt, RefusedDaily, RefusedRate}

// nearer returns which of two reasons came nearer to being allowed.
func nearer(a, b Reason) Reason {
	for i := len(reasons) - 1; i >= 0; i-- {
		if reasons[i] == a || reasons[i] == b {
			return reasons[i]
		}
	}
	return a
}

// Admits reports whether any rule names the client, so that it may connect.
func (p *Policy) Admits(id string) bool {
	return p != nil && len(p.clients[id]) > 0 && (p.and == nil || p.and.Admits(id))
}

// Check decides whether the client may do op with the key for the server name now, signing with the algorithm, as far as rates and daily budgets
// do not matter: nothing is counted. Key, algorithm and server name are looked at only if the operation has them. It does not allocate.
func (p *Policy) Check(id string, op Op, key *Entry, alg Algorithm, sni string) Reason {
	g := p.grant(id, op, key, sni)
	return g.allows(op, alg)
}

// A grant is what the rules of a client allow for an operation with a key and a server name.
type grant struct {
	schemes schemeSet // with which the operation may be done
	free    schemeSet // those of them that a rule without a limit allows
	off     schemeSet // those that the server's switches forbid
	reason  Reason    // if there are none: that of the rule that came nearest
}

// allows reports why the operation may not be done with the algorithm.
func (g *grant) allows(op Op, alg Algorithm) Reason {
	bit := op.bit(alg)
	switch {
	case g.reason != Allowed:
		return g.reason
	case g.schemes&bit == 0:
		return RefusedScheme
	case g.off&bit != 0:
		return RefusedLegacy
	}
	return Allowed
}

// limited reports whether an operation that is allowed must be counted; see [Policy.take].
func (g *grant) limited(op Op, alg Algorithm) bool { return g.free&op.bit(alg) == 0 }

// A question is what is asked of each rule of a client.
type question struct {
	op   Op
	key  *Entry
	bit  schemeSet // of the algorithm; 0 if any will do
	sni  string
	name []byte // the server name in canonical form
	host bool   // it is one
}

// grant returns what the client's rules allow with key and name.
func (p *Policy) grant(id string, op Op, key *Entry, sni string) grant {
	g := p.ownGrant(id, question{op: op, key: key, sni: sni})
	if g.reason != Allowed || p.and == nil {
		return g
	}
	other := p.and.grant(id, op, key, sni)
	other.schemes &= g.schemes
	other.free &= g.free
	other.off |= g.off
	return other
}

func (p *Policy) ownGrant(id string, q question) grant {
	if !p.Admits(id) {
		return grant{reason: RefusedClient}
	}
	var buf [maxSNI]byte
	q.name, q.host = canonicalSNI(buf[:0], q.sni)
	g := grant{reason: RefusedOp, off: p.off}
	rules := p.clients[id]
	for i := range rules {
		r := &rules[i]
		if reason := p.match(r, &q, time.Time{}); reason != Allowed {
			if g.schemes == 0 {
				g.reason = nearer(g.reason, reason)
			}
			continue
		}
		g.reason = Allowed
		set := r.set(q.op)
		g.schemes |= set
		if !r.limit.set() {
			g.free |= set
		}
	}
	return g
}

// match reports why the rule does not allow what is asked at that time, zero being now. Limits are not looked at, nor are schemes without a bit.
func (p *Policy) match(r *rule, q *question, at time.Time) Reason {
	switch {
	case r.ops&(1<<q.op) == 0:
		return RefusedOp
	case q.op.needsKey() && !r.admitsKey(q.key):
		return RefusedKey
	case q.op.needsKey() && !r.admitsSNI(q.name, q.host, q.sni == ""):
		return RefusedSNI
	case len(r.windows) > 0 && !r.open(p.when(at)):
		return RefusedWindow
	case q.bit != 0 && r.set(q.op)&q.bit == 0:
		return RefusedScheme
	}
	return Allowed
}

// when returns at, or the present time for a zero at.
func (p *Policy) when(at time.Time) time.Time {
	if at.IsZero() {
		return p.clock()
	}
	return at
}

// take counts an operation that the policy allows against one of the rules that allow it, the first that has something left, and reports
// why none has. With a rule that has no limit nothing is counted. It does not allocate.
func (p *Policy) take(id string, op Op, key *Entry, alg Algorithm, sni string) Reason {
	q := question{op: op, key: key, bit: op.bit(alg), sni: sni}
	var taken limit
	for ; p != nil; p = p.and {
		l, reason := p.ownTake(id, q, taken)
		if reason != Allowed {
			return reason
		}
		taken = l
	}
	return Allowed
}

// ownTake leaves the rule uncounted whose limit was just taken from: policies that follow each other share their counters.
func (p *Policy) ownTake(id string, q question, taken limit) (limit, Reason) {
	var buf [maxSNI]byte
	q.name, q.host = canonicalSNI(buf[:0], q.sni)
	reason := RefusedClient
	rules := p.clients[id]
	for i := range rules {
		if r := &rules[i]; !r.limit.set() && p.match(r, &q, time.Time{}) == Allowed {
			return taken, Allowed
		}
	}
	for i := range rules {
		r := &rules[i]
		no := p.match(r, &q, time.Time{})
		if no == Allowed && r.limit != taken {
			no = p.quotas.take(r.limit, p.clock())
		}
		if no == Allowed {
			return r.limit, Allowed
		}
		reason = nearer(reason, no)
	}
	return taken, reason
}

// set returns the ways in which the rule allows the operation to be done.
func (r *rule) set(op Op) schemeSet {
	if op.signs() {
		return r.schemes
	}
	return op.bit(Algorithm{})
}

// open reports whether one of the windows is open, or there are none.
func (r *rule) open(t time.Time) bool {
	for _, w := range r.windows {
		if w.Open(t) {
			return true
		}
	}
	return len(r.windows) == 0
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
