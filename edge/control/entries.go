package control

import (
	"cmp"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/keyhaven/keyhaven/edge/spec"
	"github.com/keyhaven/keyhaven/edge/zone"
	"github.com/keyhaven/keyhaven/state"
)

// Stored is a configuration that the store holds, with what the store knows of it.
type Stored[T any] struct {
	Config  T         `json:"config"`
	Created time.Time `json:"created"`
	Updated time.Time `json:"updated"`
	// Revision rises with each change. A change that names the revision it was made from fails if there is a newer one.
	Revision state.Revision `json:"revision,omitempty"`
}

// ETag is the revision as HTTP's If-Match takes it.
func (s Stored[T]) ETag() string {
	return fmt.Sprintf("%q", strconv.FormatUint(uint64(s.Revision), 10))
}

// The kinds of stored configuration.
type (
	Pool = Stored[spec.PoolConfig]
	Port = Stored[spec.PortConfig]
	Zone = Stored[zone.Config]
)

// Bounds on the number of records.
const (
	maxPools = 1024
	maxPorts = 1024
	maxZones = 1 << 14
)

// maxRecord bounds one stored configuration, in bytes of JSON.
const maxRecord = 512 << 10

// A shelf is where the model keeps the configurations of one kind.
type shelf[T any] struct {
	what   string // "pool", for messages
	prefix string // of the keys
	limit  int
	of     func(*model) map[string]Stored[T]
	name   func(*T) string
}

var (
	poolShelf = shelf[spec.PoolConfig]{"pool", prefixPool, maxPools, func(m *model) map[string]Pool { return m.pools }, func(p *spec.PoolConfig) string { return p.Name }}
	portShelf = shelf[spec.PortConfig]{"port", prefixPort, maxPorts, func(m *model) map[string]Port { return m.ports }, func(p *spec.PortConfig) string { return p.Name }}
	zoneShelf = shelf[zone.Config]{"zone", prefixZone, maxZones, func(m *model) map[string]Zone { return m.zones }, func(z *zone.Config) string { return z.Name }}
)

func applyStored[T any](to map[string]Stored[T], name string, d delta) error {
	if err := applyPlain(to, name, d); err != nil || d.value == nil {
		return err
	}
	v := to[name]
	v.Revision = d.rev
	to[name] = v
	return nil
}

// get finds one configuration.
func (s shelf[T]) get(m *model, name string) (Stored[T], error) {
	if v, ok := s.of(m)[name]; ok {
		return v, nil
	}
	return Stored[T]{}, refusal(CodeNotFound, fmt.Sprintf("'%s list' shows those that there are", s.what), "there is no %s %q", s.what, clip(name))
}

// list returns all configurations, sorted by name.
func (s shelf[T]) list(c *Control) []Stored[T] {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	list := make([]Stored[T], 0, len(s.of(c.model)))
	for _, v := range s.of(c.model) {
		list = append(list, v)
	}
	slices.SortFunc(list, func(a, b Stored[T]) int { return cmp.Compare(s.name(&a.Config), s.name(&b.Config)) })
	return list
}

// read is get for those without the model's lock.
func (s shelf[T]) read(c *Control, name string) (Stored[T], error) {
	c.model.mu.RLock()
	defer c.model.mu.RUnlock()
	return s.get(c.model, name)
}

// create returns the operation that adds v.
func (s shelf[T]) create(m *model, v T, now time.Time) ([]state.Op, error) {
	name := s.name(&v)
	if _, ok := s.of(m)[name]; ok {
		return nil, refusal(CodeExists, fmt.Sprintf("choose another name, or change it with '%s set'", s.what), "there is a %s %q already", s.what, name)
	}
	if len(s.of(m)) >= s.limit {
		return nil, refusal(CodeLimit, "delete some", "there are %d %ss, which is the limit", s.limit, s.what)
	}
	return s.write(Stored[T]{Config: v, Created: now, Updated: now})
}

// replace returns the operation that puts v in the place of the one with its name; none if nothing changes.
func (s shelf[T]) replace(m *model, v T, ifRevision state.Revision, now time.Time) ([]state.Op, error) {
	old, err := s.at(m, s.name(&v), ifRevision)
	if err != nil || reflect.DeepEqual(old.Config, v) {
		return nil, err
	}
	return s.write(Stored[T]{Config: v, Created: old.Created, Updated: now})
}

// at is get with a condition on the revision, where that is not zero.
func (s shelf[T]) at(m *model, name string, ifRevision state.Revision) (Stored[T], error) {
	old, err := s.get(m, name)
	if err == nil && ifRevision != 0 && ifRevision != old.Revision {
		err = refusal(CodeStale, "read it again and repeat the change on what is there now",
			"%s %q was changed by somebody else: it has revision %d, not %d", s.what, name, old.Revision, ifRevision)
	}
	return old, err
}

func (s shelf[T]) write(v Stored[T]) ([]state.Op, error) {
	op := put(s.prefix+s.name(&v.Config), v)
	if len(op.Value) > maxRecord {
		return nil, refusal(CodeLimit, "divide it", "%s %q takes %d bytes; the limit is %d", s.what, s.name(&v.Config), len(op.Value), maxRecord)
	}
	return []state.Op{op}, nil
}

// faulty makes one refusal of the faults of a configuration; nil if there are none.
func (s shelf[T]) faulty(name string, faults []error) error {
	if len(faults) == 0 {
		return nil
	}
	texts := make([]string, 0, len(faults))
	for _, f := range faults {
		texts = append(texts, f.Error())
	}
	return refusal(CodeInvalid, "", "%s %q: %s", s.what, clip(name), strings.Join(texts, "; "))
}

// field says at which field of a configuration err is, which may be nil.
func field(name string, err error) []error {
	if err == nil {
		return nil
	}
	return []error{fmt.Errorf("%s: %w", name, err)}
}

// inUse is the refusal to delete what others depend on, or nil.
func inUse(what, name, remedy string, users []string) error {
	if len(users) == 0 {
		return nil
	}
	return &Error{Code: CodeInUse, Users: clipUsers(users), Message: fmt.Sprintf("%s %q is in use:", what, name), Remedy: remedy}
}
