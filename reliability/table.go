package reliability

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// The lines of a document between which results stand.
const (
	begin = "<!-- results: written by go run ./reliability/cmd/matrix -->"
	end   = "<!-- end of results -->"
)

const head = `| row | failure | homes × workers | sent | lost | longest gap | recovery | workers replaced | server restarts | wrong answers | the client saw |
|---|---|---|---|---|---|---|---|---|---|---|
`

// line is a result as a line of the table. Of a row that is not as it must be, the lost are in bold.
func (r *Result) line() string {
	recovery, lost := "–", fmt.Sprint(r.Lost)
	if r.Lost > 0 {
		recovery = short(r.Recovery)
	}
	if r.Check() != nil {
		lost = "**" + lost + "**"
	}
	return fmt.Sprintf("%s | %d | %s | %s | %s | %d | %d | %d | %s |\n", r.Row.title(), r.Sent, lost, short(r.Gap), recovery,
		r.WorkerRestarts, r.ServerRestarts, r.Wrong, r.Seen())
}

func (r *Row) title() string {
	return fmt.Sprintf("| `%s` | %s | %d × %d", r.Name, r.Failure, r.Homes, r.Workers)
}

// Unmeasured is the result of a row that came to no end.
func Unmeasured(row Row) *Result { return &Result{Row: row, faults: []error{errUnmeasured}} }

var errUnmeasured = errors.New("the row came to no end")

func short(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// Table writes results as Markdown, with the machine that they are from.
func Table(results []*Result, rates []Rate) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n%s", machine(), head)
	for _, r := range results {
		if errors.Is(r.Check(), errUnmeasured) {
			fmt.Fprintf(&b, "%s | **did not recover** | | | | | | | |\n", r.Row.title())
			continue
		}
		b.WriteString(r.line())
	}
	b.WriteString("\n| sessions | operations a second | p50 | p99 |\n|---|---|---|---|\n")
	for _, r := range rates {
		fmt.Fprintf(&b, "| %d | %.0f | %s | %s |\n", r.Sessions, r.PerSecond, short(r.P50), short(r.P99))
	}
	return b.String()
}

// machine says what the results are from, in a sentence.
func machine() string {
	cpu := "a processor without a name"
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		for sc := bufio.NewScanner(f); sc.Scan(); {
			if name, value, _ := strings.Cut(sc.Text(), ":"); strings.TrimSpace(name) == "model name" {
				cpu = strings.TrimSpace(value)
				break
			}
		}
	}
	softhsm := "?"
	if out, err := exec.CommandContext(context.Background(), "softhsm2-util", "--version").Output(); err == nil {
		softhsm = strings.TrimSpace(string(out))
	}
	return fmt.Sprintf("%s: %s, %d cores, %s/%s, %s, SoftHSM %s; %d clients, each with a pause of %v between requests and %v of patience for one.",
		time.Now().UTC().Format(time.DateOnly), cpu, runtime.NumCPU(), runtime.GOOS, runtime.GOARCH, runtime.Version(), softhsm, callers, pause, timeout)
}

// Replace puts the results into a document, in place of those that stand there.
func Replace(document, results string) (string, error) {
	before, rest, ok := strings.Cut(document, begin)
	if !ok {
		return "", errors.New("reliability: the document has no line " + begin)
	}
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		return "", errors.New("reliability: the document has no line " + end)
	}
	return before + begin + "\n\n" + results + "\n" + end + after, nil
}
