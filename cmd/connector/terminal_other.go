//go:build !linux

package main

import (
	"errors"
	"os"
)

// noEcho is for Linux only; elsewhere the token comes from a file or standard input.
func noEcho(*os.File) (restore func(), err error) { return nil, errors.ErrUnsupported }
