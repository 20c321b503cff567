// Package conntrack makes connections start afresh: it deletes entries of the kernel's connection tracking table.
//
// It owns nothing, and changes no entry. Which entries go is the caller's to say; it is asked about each, so the cost grows with the
// table.
package conntrack
