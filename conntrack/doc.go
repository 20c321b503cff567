// Package conntrack makes connections start afresh: it deletes entries of the kernel's connection tracking table.
//
// It owns nothing, and changes no entry. Which entries go is the caller's to say, by filters, most of which the kernel applies itself, and by
// a function that is asked about each entry that is left.
//
// The messages are put together here, over github.com/mdlayher/netlink: neither github.com/ti-mo/conntrack (v0.6.0) nor
// github.com/vishvananda/netlink can ask for the entries of an address.
package conntrack
