// Package systemd holds the units of the programs. Its tests check them with systemd-analyze.
package systemd
