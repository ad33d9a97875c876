package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"text/tabwriter"
	"time"
)

// row is one measured line: a rate with its latencies.
type row struct {
	Group   string  `json:"group"`
	Key     string  `json:"key,omitempty"`
	Case    string  `json:"case"`
	Callers int     `json:"callers"`
	Rate    float64 `json:"rate"`
	Unit    string  `json:"unit"`
	P50     float64 `json:"p50_us,omitempty"`
	P99     float64 `json:"p99_us,omitempty"`
	CPU     float64 `json:"cpu_us,omitempty"` // processor time of one operation, all processes together
}

// target is a ratio of two figures of the same run. Without a goal it is for information.
type target struct {
	Name  string  `json:"target"`
	Ratio float64 `json:"ratio"`
	Goal  string  `json:"goal,omitempty"`
	Met   bool    `json:"met"`
}

// machine is what the bench ran on.
type machine struct {
	Time    string `json:"time"`
	CPU     string `json:"cpu"`
	Cores   int    `json:"cores"`
	Kernel  string `json:"kernel"`
	Go      string `json:"go"`
	SoftHSM string `json:"softhsm"`
	Load    string `json:"load_before"`
	Window  string `json:"window"`
	Rounds  int    `json:"rounds"`
}

// report collects rows in their order.
type report struct {
	machine machine
	rows    []row
	targets []target
	notes   []string
}

func (r *report) add(group, key, what string, callers int, s sample) {
	r.rows = append(r.rows, row{group, key, what, callers, s.rate(), "op/s", us(s.p50), us(s.p99), us(s.cpu)})
}

func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

func us(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// rate returns what was measured for a case.
func (r *report) rate(group, key, what string, callers int) float64 {
	for _, x := range r.rows {
		if x.Group == group && x.Key == key && x.Case == what && x.Callers == callers {
			return x.Rate
		}
	}
	panic(fmt.Sprintf("bench: no row %s %s %s %d", group, key, what, callers))
}

// best returns the greatest rate of a case over all numbers of callers.
func (r *report) best(group, key, what string) (best float64) {
	for _, x := range r.rows {
		if x.Group == group && x.Key == key && x.Case == what {
			best = max(best, x.Rate)
		}
	}
	return best
}

// compare reports a/b, which must be at least so much; 0 is no goal.
func (r *report) compare(name string, a, b, least float64) {
	t := target{Name: name, Ratio: a / b, Met: a/b >= least}
	if least > 0 {
		t.Goal = fmt.Sprintf(">= %.2f", least)
	}
	r.targets = append(r.targets, t)
}

// atMost reports a/b, which must be at most so much.
func (r *report) atMost(name string, a, b, most float64) {
	r.targets = append(r.targets, target{Name: name, Ratio: a / b, Goal: fmt.Sprintf("<= %.2f", most), Met: a/b <= most})
}

func (r *report) print(w io.Writer) {
	m := r.machine
	fmt.Fprintf(w, "\n%s, %d cores, Linux %s, %s, SoftHSM %s\n%s, load before %s; each figure is the median of %d rounds of %s\n\n",
		m.CPU, m.Cores, m.Kernel, m.Go, m.SoftHSM, m.Time, m.Load, m.Rounds, m.Window)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "what\tkey\tcase\tat a time\trate\tunit\tp50 µs\tp99 µs\tCPU µs")
	for _, x := range r.rows {
		fmt.Fprintf(tw, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", x.Group, dash(x.Key), x.Case, x.Callers, number(x.Rate), x.Unit, number(x.P50), number(x.P99), number(x.CPU))
	}
	fmt.Fprintln(tw, "\nratio\t\t\t\tmeasured\ttarget\t\t\t")
	for _, t := range r.targets {
		met := "MISSED"
		switch {
		case t.Goal == "":
			met = ""
		case t.Met:
			met = "met"
		}
		fmt.Fprintf(tw, "%s\t\t\t\t%.2f\t%s\t%s\t\t\n", t.Name, t.Ratio, dash(t.Goal), met)
	}
	tw.Flush()
	for _, n := range r.notes {
		fmt.Fprintln(w, n)
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func number(f float64) string {
	switch {
	case f == 0:
		return "-"
	case f < 100:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.0f", f)
}

// jsonLines writes the machine, each row and each ratio as a line of JSON.
func (r *report) jsonLines(w io.Writer) error {
	enc := json.NewEncoder(w)
	if err := enc.Encode(r.machine); err != nil {
		return err
	}
	for _, x := range r.rows {
		if err := enc.Encode(x); err != nil {
			return err
		}
	}
	for _, t := range r.targets {
		if err := enc.Encode(t); err != nil {
			return err
		}
	}
	for _, n := range r.notes {
		if err := enc.Encode(map[string]string{"note": n}); err != nil {
			return err
		}
	}
	return nil
}

func thisMachine() machine {
	m := machine{Time: time.Now().UTC().Format(time.RFC3339), Cores: runtime.NumCPU(), Go: runtime.Version(),
		CPU: fieldOf("/proc/cpuinfo", "model name"), SoftHSM: output("softhsm2-util", "--version"), Kernel: output("uname", "-r")}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load, _, _ = strings.Cut(string(b), " ")
	}
	return m
}

func fieldOf(file, field string) string {
	f, err := os.Open(file)
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if k, v, ok := strings.Cut(sc.Text(), ":"); ok && strings.TrimSpace(k) == field {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

func output(name string, args ...string) string {
	b, err := exec.Command(name, args...).Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

// write writes the lines of JSON to a file, or to standard output if it has no name.
func (r *report) write(file string) error {
	if file == "" {
		fmt.Println()
		return r.jsonLines(os.Stdout)
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(r.jsonLines(f), f.Close())
}
