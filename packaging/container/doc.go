// Package container holds what the programs' container images are made of, and the tests of the images.
package container
