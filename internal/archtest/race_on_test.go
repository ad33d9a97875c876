//go:build race

package archtest

const race = true
