// Package install serves what a machine needs to become a connector: a directory with programs and package repositories that a
// release made, and a script that installs from it. Nothing is served that is not in the directory's list of checksums,
// SHA256SUMS, whose signature is checked against configured keys, and nothing whose bytes are others than the list says.
package install
