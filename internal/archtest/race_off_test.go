//go:build !race

package archtest

const race = false
