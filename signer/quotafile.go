package signer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// quotaVersion is that of the file's format.
	quotaVersion = 1
	// maxQuotaFile is the size above which a file is none of ours.
	maxQuotaFile = 16 << 20
	// saveEvery is how often [Quotas.Run] writes the file unless told otherwise.
	saveEvery = 10 * time.Second
)

// quotaFile is the content of the file with the daily budgets, as JSON.
type quotaFile struct {
	Version int           `json:"version"`
	Budgets []savedBudget `json:"budgets"`
}

type savedBudget struct {
	Client string `json:"client"`
	Limit  string `json:"limit"`
	Nth    int    `json:"nth,omitempty"`
	Day    string `json:"day"` // 2006-01-02, UTC
	Used   int64  `json:"used"`
}

// Load reads what was used of daily budgets from the file that [Quotas.Run] wrote. A file that is not there is none at all: all budgets are full.
// Counters that are ahead of the file stay. A file that others may write is refused: it could be an older one, with more left. On an error nothing
// is changed.
func (q *Quotas) Load(path string) error {
	data, err := readOwn(path, 0o022, maxQuotaFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("signer: daily budgets: %s: %w; or move it away to begin the day with full budgets", path, err)
	}
	saved, err := parseQuotas(data)
	if err != nil {
		return fmt.Errorf("signer: daily budgets: %s is damaged: %w; restore it, or move it away to begin the day with full budgets", path, err)
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	for k, s := range saved {
		b := counter(&q.budgets, k)
		if b.day > s.day || b.day == s.day && b.used >= s.used {
			continue
		}
		b.day, b.used = s.day, s.used
	}
	return nil
}

// parseQuotas reads the file's content, strictly: budgets that are half understood could be too large ones.
func parseQuotas(data []byte) (map[quotaKey]budget, error) {
	dec := json.NewDecoder(strings.NewReader(string(data)))
	dec.DisallowUnknownFields()
	var f quotaFile
	if err := dec.Decode(&f); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows its end")
	}
	if f.Version != quotaVersion {
		return nil, fmt.Errorf("it has version %d, and this program reads version %d", f.Version, quotaVersion)
	}
	budgets := make(map[quotaKey]budget, len(f.Budgets))
	for i, s := range f.Budgets {
		day, err := time.Parse(time.DateOnly, s.Day)
		k := quotaKey{client: s.Client, limit: s.Limit, nth: s.Nth}
		_, twice := budgets[k]
		if err != nil || s.Used < 0 || s.Nth < 0 || s.Client == "" || s.Limit == "" || twice {
			return nil, fmt.Errorf("budget %d is not as it should be", i)
		}
		budgets[k] = budget{day: dayOf(day), used: s.Used}
	}
	return budgets, nil
}

// snapshot returns what Save writes: what was used today and later, and on the day before, on which a clock may be that goes back. A later day is that of
// a clock that was wrong.
func (q *Quotas) snapshot() quotaFile {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.changed = false
	f := quotaFile{Version: quotaVersion, Budgets: []savedBudget{}}
	for k, b := range q.budgets {
		if b.used > 0 && b.day >= q.today-1 {
			day := time.Unix(b.day*24*60*60, 0).UTC().Format(time.DateOnly)
			f.Budgets = append(f.Budgets, savedBudget{Client: k.client, Limit: k.limit, Nth: k.nth, Day: day, Used: b.used})
		}
	}
	slices.SortFunc(f.Budgets, func(a, b savedBudget) int {
		return slices.Compare([]string{a.Client, a.Limit, fmt.Sprintf("%09d", a.Nth)}, []string{b.Client, b.Limit, fmt.Sprintf("%09d", b.Nth)})
	})
	return f
}

// Save writes what was used of daily budgets to the file, of mode 0600, whole or not at all.
func (q *Quotas) Save(path string) error {
	err := writeQuotas(path, q.snapshot())
	if err != nil {
		q.mu.Lock()
		q.changed = true
		q.mu.Unlock()
		return fmt.Errorf("signer: save daily budgets: %w", err)
	}
	return nil
}

func writeQuotas(path string, f quotaFile) (err error) {
	data, err := json.MarshalIndent(f, "", "\t")
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	temp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".tmp-*") // has mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			temp.Close()
			os.Remove(temp.Name())
		}
	}()
	if _, err := temp.Write(append(data, '\n')); err != nil {
		return err
	}
	if err := temp.Sync(); err != nil {
		return err
	}
	if err := temp.Close(); err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Run writes the file whenever something was counted, each time after every (0: 10 s), and once more when ctx has ended. So a crash loses what was
// counted in the last such time, and no more. A failure is logged when it begins, and tried again; that of the last time is returned.
func (q *Quotas) Run(ctx context.Context, path string, every time.Duration, l *slog.Logger) error {
	if l == nil {
		l = slog.New(slog.DiscardHandler)
	}
	if every <= 0 {
		every = saveEvery
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	failing := false
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			if !q.dirty() {
				return nil
			}
			return q.Save(path)
		}
		if !q.dirty() {
			continue
		}
		err := q.Save(path)
		switch {
		case err != nil && !failing:
			l.Error("daily budgets are not saved, so a restart would renew them", "err", err)
		case err == nil && failing:
			l.Info("daily budgets are saved again")
		}
		failing = err != nil
	}
}

func (q *Quotas) dirty() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.changed
}
