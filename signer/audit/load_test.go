package audit

import (
	"context"
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// Rotation under load leaves no gap: every record is there once, in files that continue one another.
func TestRotationUnderLoad(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, RotateSize: 20 << 10, Checkpoint: time.Millisecond, Queue: 16})
	const committers, each = 32, 20
	var wg sync.WaitGroup
	for w := range committers {
		wg.Go(func() {
			for i := range each {
				r := testRecord(i)
				r.RequestID = fmt.Sprintf("%d-%d", w, i)
				if err := l.Commit(t.Context(), r); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 3 {
		if err := l.Rotate(t.Context()); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	if err := l.Rotate(t.Context()); err != nil {
		t.Error(err)
	}
	s := l.Stats()
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	var all []string
	for w := range committers {
		for i := range each {
			all = append(all, fmt.Sprintf("%d-%d", w, i))
		}
	}
	checkKept(t, dir, pub, all)
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Records != committers*each || rep.Uncovered != 0 || rep.Files < 8 {
		t.Errorf("got %+v", rep)
	}
	if s.Records != committers*each || s.Batches >= s.Records || s.Lost != 0 || s.Waiting != 0 || s.SyncTotal == 0 || s.SyncMax < s.SyncLast || int(s.Files) != rep.Files {
		t.Errorf("got %+v", s)
	}
	if err := l.Rotate(t.Context()); err != ErrClosed {
		t.Errorf("rotation after the end: got %v, want %v", err, ErrClosed)
	}
}

func TestRotationByTime(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, RotateEvery: 10 * time.Millisecond})
	l.commit(t, 0, 1)
	eventually(t, "the next file", func() bool { return l.Stats().Files >= 2 })
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
	if rep.Problem != nil || rep.Files != 2 {
		t.Errorf("got %+v, want two files: one without records is not ended", rep)
	}
}

// Verify may be used while a server writes.
func TestVerifyWhileWriting(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, RotateSize: 30 << 10, Checkpoint: time.Millisecond})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 1000 { // an end, as there are disks that are faster than 20 readings of everything
				_ = l.Commit(t.Context(), testRecord(i)) // that it works is other tests' affair
			}
		})
	}
	written := make(chan struct{})
	go func() { wg.Wait(); close(written) }()
	defer func() { <-written }()
	eventually(t, "a checkpoint that covers records", func() bool { return l.Stats().Checkpoints >= 2 })
	for n := 1; ; n++ {
		rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
		if rep.Problem != nil {
			t.Errorf("got %v", rep.Problem)
			return
		}
		select {
		case <-written:
			t.Logf("verified %d times while %d records were written", n, rep.Records)
			return
		default:
		}
	}
}

// A record whose context has ended is written all the same.
func TestEndedContext(t *testing.T) {
	key, pub := newKey(t)
	dir := t.TempDir()
	gate := make(chan struct{}, 1)
	gate <- struct{}{}
	l := open(t, Config{Dir: dir, Mode: Required, Server: testServer, Signer: key, disk: stuckDisk{gate: gate}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Commit(ctx, testRecord(0)); err == nil {
		t.Error("committed, though nothing was durable")
	}
	close(gate)
	if err := l.end(t); err != nil {
		t.Fatal(err)
	}
	if rep := verify(t, VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}}); rep.Problem != nil || rep.Records != 1 {
		t.Errorf("got %+v, want the record", rep)
	}
}

// perRecord keeps records as Commit does, but with one fdatasync for each, to compare with.
type perRecord struct {
	mu     sync.Mutex
	f      file
	sealer *sealer
	seq    uint64
	head   Hash
	buf    []byte
}

func (p *perRecord) commit(i int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seq++
	p.buf = appendOp(p.buf[:0], p.seq, testRecord(i))
	p.buf, p.head = p.sealer.seal(p.buf, 0, &p.head)
	if _, err := p.f.Write(p.buf); err != nil {
		return err
	}
	return p.f.datasync()
}

// BenchmarkCommit commits from several goroutines with every record durable, in groups as the log does and with one fdatasync for each record. AUDIT_BENCH_DIR names
// a directory on the disk to measure.
func BenchmarkCommit(b *testing.B) {
	base := os.Getenv("AUDIT_BENCH_DIR")
	key, _ := newKey(b)
	temp := func(b *testing.B) string {
		if base == "" {
			return b.TempDir()
		}
		dir, err := os.MkdirTemp(base, "audit-bench-")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { os.RemoveAll(dir) })
		return dir
	}
	run := func(b *testing.B, committers int, commit func(i int) error) {
		b.ReportAllocs()
		b.ResetTimer()
		var wg sync.WaitGroup
		next := make(chan int, committers)
		for range committers {
			wg.Go(func() {
				for i := range next {
					if err := commit(i); err != nil {
						b.Error(err)
					}
				}
			})
		}
		for i := range b.N {
			next <- i
		}
		close(next)
		wg.Wait()
		b.StopTimer()
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "records/s")
	}
	for _, committers := range []int{1, 8, 64, 256} {
		b.Run(fmt.Sprintf("group/%d", committers), func(b *testing.B) {
			l := open(b, Config{Dir: temp(b), Mode: Required, Server: testServer, Signer: key})
			before := l.Stats()
			run(b, committers, func(i int) error { return l.Commit(context.Background(), testRecord(i)) })
			s := l.Stats()
			b.ReportMetric(float64(s.Records-before.Records)/float64(s.Batches-before.Batches), "records/fsync")
			b.ReportMetric(float64((s.SyncTotal-before.SyncTotal).Microseconds())/float64(s.Batches-before.Batches), "µs/fsync")
			if err := l.end(b); err != nil {
				b.Fatal(err)
			}
		})
		b.Run(fmt.Sprintf("each/%d", committers), func(b *testing.B) {
			f, err := realDisk{}.create(filepath.Join(temp(b), "log"), false)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			p := &perRecord{f: f, sealer: newSealer()}
			run(b, committers, p.commit)
		})
	}
}

// BenchmarkEncode is the writer's work for a record besides the disk.
func BenchmarkEncode(b *testing.B) {
	b.ReportAllocs()
	s := newSealer()
	r := testRecord(1)
	var head Hash
	var buf []byte
	for b.Loop() {
		buf = appendOp(buf[:0], 1, r)
		buf, head = s.seal(buf, 0, &head)
	}
	b.SetBytes(int64(len(buf)))
}

func BenchmarkVerify(b *testing.B) {
	key, pub := newKey(b)
	dir := b.TempDir()
	l := open(b, Config{Dir: dir, Mode: BestEffort, Server: testServer, Signer: key, Queue: 20000})
	l.commit(b, 0, 20000)
	if err := l.end(b); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		rep, err := Verify(b.Context(), VerifyConfig{Dir: dir, Keys: []crypto.PublicKey{pub}})
		if err != nil || rep.Problem != nil {
			b.Fatal(err, rep.Problem)
		}
	}
	b.ReportMetric(float64(b.N)*20000/b.Elapsed().Seconds(), "records/s")
}
