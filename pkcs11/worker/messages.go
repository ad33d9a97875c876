package worker

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"
)

// confineRequest is what a worker is told first: how to confine itself.
type confineRequest struct {
	Mode                  string
	ReadPaths, WritePaths []string
	Network               bool
	MaxMemory             int64
	MaxFiles              int
	Module                string
}

// confinement is what became of it.
type confinement struct {
	Landlock int      // ABI of the kernel's Landlock, 0 if it was not used
	Lacks    []string // what this kernel does not confine
}

// openRequest is what a confined worker is told: what to open.
type openRequest struct {
	Mode                            string
	Network                         bool
	URI, Module                     string
	Sessions                        int
	AllowExtractable, AllowFinalTry bool
	Deadline, KeepAlive             time.Duration
}

// readyReply is what a worker says when it is logged in.
type readyReply struct {
	Token    string
	Sessions int
}

// logRecord is a line of a worker's log.
type logRecord struct {
	Level   slog.Level
	Message string
	Attrs   [][2]string
}

// Bounds of a logRecord.
const (
	maxLogText  = 2048 // bytes of each text
	maxLogAttrs = 16
)

// decodeJSON reads one JSON value into v, strictly.
func decodeJSON(what string, body []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("%w: %s: %w", errFrame, what, err)
	}
	return nil
}

// encodeJSON is for our own types, which always have a JSON form.
func encodeJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}
