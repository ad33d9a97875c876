// Package doctest holds the project's documentation against its programs: each configuration key, each command line and
// each metric that a page names must be there, and the pages of reference must name all of them.
package doctest
