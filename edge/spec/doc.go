// Package spec holds the configuration of pools and public ports, as configuration files, the admin API and the store
// write it. Checks name the field at fault. It imports nothing of the project.
package spec
