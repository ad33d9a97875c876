package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// promptPIN asks the terminal for a PIN, without an echo.
func promptPIN() (pin pkcs11.PIN, err error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return pin, errors.New("no PIN: there is no terminal to ask; add pin-source to the URI, or give --pin-file")
	}
	defer tty.Close()
	fd := int(tty.Fd())
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return pin, fmt.Errorf("terminal: %w", err)
	}
	silent := *before
	silent.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &silent); err != nil {
		return pin, fmt.Errorf("terminal: %w", err)
	}
	defer func() { err = errors.Join(err, unix.IoctlSetTermios(fd, unix.TCSETS, before)) }()
	fmt.Fprint(tty, "PIN: ")
	line, err := bufio.NewReader(tty).ReadString('\n')
	fmt.Fprintln(tty)
	if err != nil {
		return pin, fmt.Errorf("terminal: %w", err)
	}
	if line = strings.TrimRight(line, "\r\n"); line == "" {
		return pin, errors.New("no PIN was given")
	}
	return pkcs11.NewPIN(line), nil
}
