// Package plan decides. From a snapshot of etcd and the facts of a node it says which egress IPs the node tries for (Claims), which
// it has to let go (Releases), which planned moves concern it (Arrivals, Departures), and what its kernel has to hold (Build).
//
// Every function is pure: no I/O, no clock, no logging, and equal arguments give equal results on every node, so that nodes agree
// on who is first in rank without talking to each other. What a function returns is sorted.
package plan
