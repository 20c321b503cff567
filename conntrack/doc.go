// Package conntrack deletes entries of the kernel's connection tracking table, so that their connections are tracked
// and translated anew; lists them (Marked, Flows, CountByID); and reports connections that begin and end (Listen).
//
// It owns nothing, and changes no entry. Which entries go is the caller's to say, by filters, most of which the kernel
// applies itself, and by a function that is asked about each entry that is left.
//
// The messages are put together here, over github.com/mdlayher/netlink: neither github.com/ti-mo/conntrack (v0.6.0) nor
// github.com/vishvananda/netlink can ask for the entries of an address. Nor do they do for events: the former gives its
// socket to nobody, so there is no filter in the kernel and every connection of the node is decoded, it ends at the
// first event that the kernel could not deliver and does not say how many those were, and the latter has no events of
// connections.
package conntrack
