package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyhaven/keyhaven/edge/admin"
	"github.com/keyhaven/keyhaven/edge/control"
	"github.com/keyhaven/keyhaven/internal/cli"
)

// client returns a client of the edge that --socket or the environment names.
func client(cmd *cobra.Command) *admin.Client {
	path, _ := cmd.Flags().GetString("socket") // a flag of the root
	if path == "" {
		path = os.Getenv(envPrefix + "_SOCKET")
	}
	if path == "" {
		path = defaultSocket
	}
	return admin.NewClient(path)
}

// asked runs f with a client and gives its error the exit code that it deserves.
func asked(cmd *cobra.Command, f func(*admin.Client) error) error {
	c := client(cmd)
	defer c.Close()
	err := f(c)
	if errors.Is(err, control.ErrInvalid) {
		return cli.UsageError("%w", err)
	}
	return err
}

// row prints the cells of a line of a table.
func row(w io.Writer, cells ...any) {
	parts := make([]string, len(cells))
	for i, c := range cells {
		if parts[i] = strings.TrimSpace(fmt.Sprint(c)); parts[i] == "" {
			parts[i] = "-"
		}
	}
	fmt.Fprintln(w, strings.Join(parts, "\t"))
}

// when prints a time, or nothing for the zero time.
func when(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05")
}

func mark(b bool) string {
	if b {
		return "yes"
	}
	return ""
}
