package etcd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"github.com/keyhaven/keyhaven/internal/etcdtest"
	"github.com/keyhaven/keyhaven/state"
	"github.com/keyhaven/keyhaven/state/statetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds the wait for something that must happen.
const patience = 30 * time.Second

func mustOpen(t testing.TB, cfg Config) state.Store {
	t.Helper()
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

func TestConformance(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	statetest.Run(t, statetest.Engine{Open: func(t testing.TB, dir string) state.Store {
		s, err := Open(Config{Endpoints: etcdtest.URLs(ms), Prefix: dir})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}})
}

// Two installations share a cluster and see nothing of one another.
func TestPrefix(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	a, b := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms), Prefix: "/a"}), mustOpen(t, Config{Endpoints: etcdtest.URLs(ms), Prefix: "/a/b/"})
	ctx := t.Context()
	first, err := state.Create(ctx, a, "x", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	other := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms), Prefix: "/ab"})
	for range 5 {
		if _, err := other.Txn(ctx, nil, []state.Op{state.Put("x", nil)}); err != nil {
			t.Fatal(err)
		}
	}
	if es, _, err := b.List(ctx, ""); err != nil || len(es) != 0 {
		t.Errorf("the other prefix lists %v, %v", es, err)
	}
	events, err := a.Watch(ctx, "", first)
	if err != nil {
		t.Fatal(err)
	}
	rev, err := a.Txn(ctx, []state.Cond{{Key: "x", Revision: first}}, []state.Op{state.Put("x", []byte("2"))})
	if err != nil || rev <= first+1 {
		t.Errorf("Txn after others' changes: revision %d after %d, %v", rev, first, err)
	}
	if ev := <-events; ev.Key != "x" || string(ev.Value) != "2" || ev.Revision != rev {
		t.Errorf("the first event is %+v, want x=2 at %d", ev, rev)
	}
}

// History that the cluster has dropped is compacted, for listings of old and for watches.
func TestCompaction(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	s := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms)}).(*store)
	ctx := t.Context()
	var rev state.Revision
	var err error
	for range 10 {
		if rev, err = s.Txn(ctx, nil, []state.Op{state.Put("x", nil)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.c.Compact(ctx, int64(rev)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Watch(ctx, "", rev-5); !errors.Is(err, state.ErrCompacted) {
		t.Errorf("watch of compacted history: %v, want ErrCompacted", err)
	}
	events, err := s.Watch(ctx, "", rev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Txn(ctx, nil, []state.Op{state.Put("y", nil)}); err != nil {
		t.Fatal(err)
	}
	if ev := <-events; ev.Key != "y" {
		t.Errorf("got %+v, want y", ev)
	}
}

// A watcher that does not read costs bounded memory and is told that it has missed something.
func TestQueueBound(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	s, err := open(Config{Endpoints: etcdtest.URLs(ms), Timeout: defaultTimeout}, 8, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	_, rev, err := s.List(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	events, err := s.Watch(t.Context(), "", rev)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		if _, err := s.Txn(t.Context(), nil, []state.Op{state.Put(strconv.Itoa(i), nil)}); err != nil {
			t.Fatal(err)
		}
	}
	for ev := range events {
		if ev.Err != nil {
			if !errors.Is(ev.Err, state.ErrCompacted) {
				t.Errorf("the watch ended with %v, want ErrCompacted", ev.Err)
			}
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Error("the watch ended without a word")
}

// A cluster that does not answer is told from every other failure, in time, and is used again when it is back.
func TestAway(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	s := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms), Timeout: time.Second})
	ctx := t.Context()
	rev, err := state.Create(ctx, s, "x", []byte("1"))
	if err != nil {
		t.Fatal(err)
	}
	events, err := s.Watch(ctx, "", rev)
	if err != nil {
		t.Fatal(err)
	}
	ms[0].Freeze()
	if _, err := s.Get(ctx, "x"); !errors.Is(err, state.ErrUnavailable) {
		t.Errorf("Get: %v, want ErrUnavailable", err)
	}
	if _, _, err := s.List(ctx, ""); !errors.Is(err, state.ErrUnavailable) {
		t.Errorf("List: %v, want ErrUnavailable", err)
	}
	if _, err := s.Txn(ctx, nil, []state.Op{state.Put("y", nil)}); !errors.Is(err, state.ErrUnavailable) || !strings.Contains(err.Error(), "127.0.0.1:") {
		t.Errorf("Txn: %v, want ErrUnavailable and the address", err)
	}
	ms[0].Thaw()
	for end := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if _, err = s.Txn(ctx, nil, []state.Op{state.Put("z", []byte("2"))}); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("not back after %v: %v", patience, err)
		}
	}
	for ev := range events { // the watch has seen what came, or says that it ended
		if ev.Key == "z" || ev.Err != nil {
			return
		}
	}
	t.Error("the watch ended without a word")
}

// unused is an address at which nobody listens.
func unused(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func TestOpenRefuses(t *testing.T) {
	t.Parallel()
	dead := "http://" + unused(t)
	if _, err := Open(Config{Endpoints: []string{dead}, Timeout: 500 * time.Millisecond}); !errors.Is(err, state.ErrUnavailable) {
		t.Errorf("nobody there: %v, want ErrUnavailable", err)
	}
	secret := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(secret, []byte("canary-7f3a\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, want string
		cfg        Config
	}{
		{"no endpoint", "no endpoints", Config{}},
		{"clear text", "not encrypted", Config{Endpoints: []string{"http://192.0.2.1:2379"}}},
		{"no URL", "no URL", Config{Endpoints: []string{"etcd1:2379"}}},
		{"credentials in the URL", "no URL", Config{Endpoints: []string{"https://u:p@etcd1:2379"}}},
		{"another scheme", "neither", Config{Endpoints: []string{"ftp://etcd1:2379"}}},
		{"half a certificate", "both cert and key", Config{Endpoints: []string{dead}, Cert: "x"}},
		{"half a user", "both username", Config{Endpoints: []string{dead}, Username: "x"}},
		{"prefix", "prefix", Config{Endpoints: []string{dead}, Prefix: "/a\x00"}},
		{"open password file", "chmod 600", Config{Endpoints: []string{dead}, Username: "x", PasswordFile: secret}},
		{"no authority", "read the authority", Config{Endpoints: []string{"https://127.0.0.1:1"}, CA: "/nonexistent"}},
	} {
		_, err := Open(tt.cfg)
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}

// One of three members is killed while many write and watch: nothing is lost, doubled or refused.
func TestMemberKilled(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 3)
	s := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms), Timeout: 10 * time.Second})
	ctx := t.Context()
	rev, err := state.Create(ctx, s, "n", []byte("0"))
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan struct{})
	const writers, each = 3, 40
	events, err := s.Watch(ctx, "n", rev)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(seen)
		last := 0
		for ev := range events {
			if ev.Err != nil {
				t.Errorf("the watch ended: %v", ev.Err)
				return
			}
			n, _ := strconv.Atoi(string(ev.Value))
			if n != last+1 {
				t.Errorf("the watch saw %d after %d", n, last)
			}
			if last = n; n == writers*each {
				return
			}
		}
	}()
	var done atomic.Int32
	var kill sync.Once
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				if err := increment(ctx, s); err != nil {
					t.Error(err)
					return
				}
				if done.Add(1) == writers*each/3 {
					kill.Do(ms[leader(t, ms)].Kill)
				}
			}
		})
	}
	wg.Wait()
	e, err := s.Get(ctx, "n")
	if err != nil || string(e.Value) != strconv.Itoa(writers*each) {
		t.Errorf("got %s, %v, want %d", e.Value, err, writers*each)
	}
	select {
	case <-seen:
	case <-time.After(patience):
		t.Error("the watch has not seen the last change")
	}
}

func increment(ctx context.Context, s state.Store) error {
	for {
		e, err := s.Get(ctx, "n")
		if err != nil {
			return err
		}
		n, _ := strconv.Atoi(string(e.Value))
		_, err = s.Txn(ctx, []state.Cond{e.Unchanged()}, []state.Op{state.Put("n", []byte(strconv.Itoa(n+1)))})
		if !errors.Is(err, state.ErrConflict) {
			return err
		}
	}
}

// leader is the member that leads the cluster.
func leader(t testing.TB, ms []*etcdtest.Member) int {
	t.Helper()
	for i, m := range ms {
		s, err := open(Config{Endpoints: []string{m.URL}, Timeout: patience}, 1, 1)
		if err != nil {
			t.Fatal(err)
		}
		st, err := s.c.Status(t.Context(), m.URL)
		s.Close()
		if err != nil {
			t.Fatal(err)
		}
		if st.Leader == st.Header.MemberId {
			return i
		}
	}
	t.Fatal("the cluster has no leader")
	return 0
}

// A cluster with users takes the password of the file, and says what is wrong with another without repeating it.
func TestUsers(t *testing.T) {
	t.Parallel()
	ms := etcdtest.Start(t, 1)
	s := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms)}).(*store)
	ctx := t.Context()
	const canary = "canary-51c8"
	var errs []error
	for _, user := range []struct{ name, role string }{{"root", "root"}, {"edge", "edges"}, {"guest", "none"}} {
		_, err := s.c.UserAdd(ctx, user.name, canary)
		_, rerr := s.c.RoleAdd(ctx, user.role)
		_, gerr := s.c.UserGrantRole(ctx, user.name, user.role)
		errs = append(errs, err, rerr, gerr)
	}
	_, err := s.c.RoleGrantPermission(ctx, "edges", "/keyhaven/", "/keyhaven0", clientv3.PermissionType(clientv3.PermReadWrite))
	_, aerr := s.c.AuthEnable(ctx)
	if err := errors.Join(append(errs, err, aerr)...); err != nil {
		t.Fatal(err)
	}
	file := func(password string) string {
		path := filepath.Join(t.TempDir(), "password")
		if err := os.WriteFile(path, []byte(password+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	edge := mustOpen(t, Config{Endpoints: etcdtest.URLs(ms), Username: "edge", PasswordFile: file(canary)})
	if _, err := state.Create(ctx, edge, "x", nil); err != nil {
		t.Errorf("with the right password: %v", err)
	}
	for _, tt := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"another password", Config{Username: "edge", PasswordFile: file(canary + "x")}, "invalid user ID or password"},
		{"no user", Config{}, "user name is empty"},
		{"no permission", Config{Username: "guest", PasswordFile: file(canary)}, "permission denied"},
	} {
		tt.cfg.Endpoints = etcdtest.URLs(ms)
		_, err := Open(tt.cfg)
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), canary) || errors.Is(err, state.ErrUnavailable) {
			t.Errorf("%s: %v, want %q", tt.name, err, tt.want)
		}
	}
}
