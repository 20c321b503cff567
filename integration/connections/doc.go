// Package connections measures which connections survive a fault or a move of the gateway of their egress IP: many at
// once, of every kind, from several pods with the same source ports to one destination, in a lab of its own. `egret-lab
// bench connections` runs it, docs/failover.md has what it measured. It writes a line of CSV a connection, a plot of
// how long they were without an answer, and a table.
//
// Both ends are goroutines of the calling process with sockets in the namespaces, so that one clock times both. The
// package owns nothing but the lab that it makes and removes. It never lets a packet with another source address than
// the egress IP pass: that is an error.
package connections
