// Package integration tests whole installations of the real programs over network namespaces. Its tests have the build
// tag netns and are run by make netns.
package integration
