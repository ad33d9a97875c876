// Package packages has apt, dpkg, dnf and rpm take the packages and the repository that packaging/ makes: in a tree of Debian,
// in namespaces, from a web server on loopback. Its tests carry the tag packages; make packages-check builds what they need.
package packages
