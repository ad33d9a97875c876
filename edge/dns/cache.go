package dns

import (
	"container/list"
	"sync"
	"time"

	mdns "github.com/miekg/dns"
)

const (
	// maxCached bounds the answers in the cache; the one that was longest not asked for goes first.
	maxCached = 10_000
	// maxCachedSize bounds an answer in the cache. Longer ones are asked for each time.
	maxCachedSize = 4096
	// maxTTL and maxNegativeTTL bound how long an answer stays. See RFC 2308, section 5.
	maxTTL         = time.Hour
	maxNegativeTTL = 5 * time.Minute
)

// A cache holds answers for as long as they are valid.
type cache struct {
	max int

	mu      sync.Mutex // guards the fields below
	entries map[question]*list.Element
	recent  *list.List // of *entry, the last used first
}

type entry struct {
	question
	reply    *mdns.Msg
	from, to time.Time
}

func newCache(max int) *cache {
	return &cache{max: max, entries: map[question]*list.Element{}, recent: list.New()}
}

// get returns a copy with the TTLs that are left.
func (c *cache) get(k question, now time.Time) (*mdns.Msg, bool) {
	c.mu.Lock()
	el := c.entries[k]
	if el == nil {
		c.mu.Unlock()
		return nil, false
	}
	e := el.Value.(*entry)
	if !now.Before(e.to) {
		c.removeLocked(el)
		c.mu.Unlock()
		return nil, false
	}
	c.recent.MoveToFront(el)
	c.mu.Unlock()
	reply := e.reply.Copy()
	age := uint32(max(now.Sub(e.from), 0) / time.Second)
	for _, rr := range records(reply) {
		h := rr.Header()
		h.Ttl -= min(h.Ttl, age)
	}
	return reply, true
}

// put keeps a copy of reply if it may be kept.
func (c *cache) put(k question, reply *mdns.Msg, now time.Time) {
	ttl := lifetime(reply)
	if ttl <= 0 || reply.Len() > maxCachedSize {
		return
	}
	e := &entry{question: k, reply: reply.Copy(), from: now, to: now.Add(ttl)}
	c.mu.Lock()
	defer c.mu.Unlock()
	if el := c.entries[k]; el != nil {
		c.removeLocked(el)
	}
	c.entries[k] = c.recent.PushFront(e)
	if c.recent.Len() > c.max {
		c.removeLocked(c.recent.Back())
	}
}

func (c *cache) removeLocked(el *list.Element) {
	delete(c.entries, el.Value.(*entry).question)
	c.recent.Remove(el)
}

// records are those of a reply that have a TTL.
func records(m *mdns.Msg) (list []mdns.RR) {
	for _, section := range [][]mdns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if rr.Header().Rrtype != mdns.TypeOPT {
				list = append(list, rr)
			}
		}
	}
	return list
}

// lifetime is how long a reply may be kept; zero: not at all.
func lifetime(m *mdns.Msg) time.Duration {
	negative := m.Rcode == mdns.RcodeNameError || m.Rcode == mdns.RcodeSuccess && len(m.Answer) == 0
	if m.Truncated || m.Rcode != mdns.RcodeSuccess && !negative {
		return 0
	}
	longest := maxTTL
	if negative {
		longest = 0
		for _, rr := range m.Ns { // without an SOA nobody says how long it holds
			if soa, ok := rr.(*mdns.SOA); ok {
				longest = min(maxNegativeTTL, time.Duration(soa.Minttl)*time.Second)
			}
		}
	}
	for _, rr := range records(m) {
		longest = min(longest, time.Duration(rr.Header().Ttl)*time.Second)
	}
	return longest
}
