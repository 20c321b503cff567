// Package routing routes packets by their marks, which package nft sets: into the overlay to another node, or out of
// this node. For that it keeps the overlay link (VXLAN), permanent FDB entries for its peers, policy rules (ip rule),
// and route tables.
//
// It owns, in the network namespace of who called New:
//
//   - the link egret.vx, with everything on it, its rp_filter and its addr_gen_mode;
//   - the ip rules of protocol 94 with a priority from 1000 to 1999;
//   - the routes of protocol 94 in the tables 7000 to 15191, one for each routing mark, and one that leads nowhere.
//
// Rules and routes of another protocol are never touched, wherever they are: an operator may put a rule of his own
// between ours, or a route of his own into our tables. But the local routes that the kernel makes with the addresses of
// egress IPs go: answers to the pods of other nodes would end there.
//
// Invariants:
//
//   - What is needed comes before what needs it, and goes after it: no rule ever points to a route that is not there.
//   - A route that changes is never away: the new one comes before the old one goes.
//   - A read that the kernel interrupted is repeated, never taken for whole.
//   - Nothing is remembered: Diff compares what the kernel says with what is wanted.
//
// It does not choose addresses, marks or the MTU, does not filter or translate packets (package nft), and does not
// carry the addresses of egress IPs (package vlan).
package routing
