package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/keyhaven/keyhaven/pkcs11"
)

// promptPIN asks the terminal for a PIN, without an echo. When ctx ends, as Ctrl-C makes it, the echo comes back.
func promptPIN(ctx context.Context) (pin pkcs11.PIN, err error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return pin, errors.New("no PIN: there is no terminal to ask; add pin-source to the URI, or give --pin-file")
	}
	defer tty.Close()
	// Not tty.Fd, which would make reads deaf to deadlines.
	raw, err := tty.SyscallConn()
	if err != nil {
		return pin, fmt.Errorf("terminal: %w", err)
	}
	before, err := setEcho(raw, nil)
	if err != nil {
		return pin, err
	}
	defer func() {
		_, restored := setEcho(raw, before)
		err = errors.Join(err, restored)
	}()
	stop := context.AfterFunc(ctx, func() { _ = tty.SetReadDeadline(time.Unix(1, 0)) }) // a terminal that takes no deadline waits for a second signal
	defer stop()
	fmt.Fprint(tty, "PIN: ")
	line, err := bufio.NewReader(tty).ReadString('\n')
	fmt.Fprintln(tty)
	switch line = strings.TrimRight(line, "\r\n"); {
	case ctx.Err() != nil:
		return pin, fmt.Errorf("no PIN was given: %w", ctx.Err())
	case err != nil:
		return pin, fmt.Errorf("terminal: %w", err)
	case line == "":
		return pin, errors.New("no PIN was given")
	}
	return pkcs11.NewPIN(line), nil
}

// setEcho puts the terminal into a state, or, if it is nil, turns the echo off. It returns the state before.
func setEcho(raw syscall.RawConn, state *unix.Termios) (before *unix.Termios, err error) {
	control := raw.Control(func(fd uintptr) {
		if before, err = unix.IoctlGetTermios(int(fd), unix.TCGETS); err != nil {
			return
		}
		next := *before
		next.Lflag &^= unix.ECHO
		if state != nil {
			next = *state
		}
		err = unix.IoctlSetTermios(int(fd), unix.TCSETS, &next)
	})
	if err = errors.Join(control, err); err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	return before, nil
}
